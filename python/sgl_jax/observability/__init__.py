"""What the server says about itself: logs, metrics, profiles."""
