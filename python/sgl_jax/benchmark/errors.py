"""What the measuring tools tell their user in one line."""


class BenchmarkError(Exception):
    """A mistake of the user or the server, told without a traceback."""
