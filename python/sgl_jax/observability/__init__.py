"""Log lines, metrics and progress of the server."""
