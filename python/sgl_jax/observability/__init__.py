"""The server about itself: logs, metrics, profiles."""
