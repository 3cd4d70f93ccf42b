"""Chat in a terminal, with a server or with an engine in this process."""
