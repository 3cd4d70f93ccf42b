"""Server-sent events out of bytes that may be cut anywhere."""

from __future__ import annotations

import re

_LINE_END = re.compile(rb"\r\n|\n|\r")


class EventParser:
    """Feed it chunks as they come; each call gives the data of the events that are complete by then.

    Follows the standard's rules: lines end with CRLF, LF or CR, an empty line ends an event, `data` lines are joined
    with newlines, comments and other fields are dropped.
    """

    def __init__(self) -> None:
        self._rest = b""  # of a line without its end
        self._after_cr = False  # the last chunk ended with CR, which a LF may follow
        self._data: list[bytes] = []

    def feed(self, chunk: bytes) -> list[bytes]:
        if self._after_cr and chunk:
            chunk = chunk.removeprefix(b"\n")
            self._after_cr = False
        self._after_cr = self._after_cr or chunk.endswith(b"\r")
        *lines, self._rest = _LINE_END.split(self._rest + chunk)
        events = []
        for line in lines:
            if not line and self._data:
                events.append(b"\n".join(self._data))
                self._data = []
            name, _, value = line.partition(b":")
            if name == b"data":
                self._data.append(value.removeprefix(b" "))
        return events
