"""Errors of this room."""


class ModelError(ValueError):
    """A model cannot be served as it is. The message says what was found, what was looked for and what to change."""
