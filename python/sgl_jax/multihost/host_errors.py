"""Errors between hosts, in lines for the user."""

from __future__ import annotations


class HostsError(ValueError):
    """The hosts cannot work together; the message says which host and why."""


class WireError(HostsError):
    """A frame that came over the wire is none of our messages."""


class LinkClosed(HostsError):
    """The other side closed the connection."""
