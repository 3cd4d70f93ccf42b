"""Text that comes in pieces, for parsers written as generators: they pause, with `yield`, until they have what they need.

So a parser sees one text, however it was cut, and what it finds depends on the text alone.
"""

import functools
import json
import re
from collections.abc import Callable, Generator, Sequence
from typing import NamedTuple

type Waiting[T] = Generator[None, None, T]
type Emit = Callable[[str], None]


class Brackets(NamedTuple):
    """How a language writes nested values: what matters outside strings, and inside one by its quote."""

    outside: re.Pattern[str]
    inside: dict[str, re.Pattern[str]]


JSON = Brackets(re.compile(r'["{}\[\]]'), {'"': re.compile(r'["\\]')})
PYTHON = Brackets(re.compile(r"""["'{}\[\]()]"""), {'"': re.compile(r'["\\]'), "'": re.compile(r"['\\]")})

_HEADER = 256  # characters; the name of a function has 64 at most
_LONG = 1024  # characters
_CONTROL = {code: json.dumps(chr(code))[1:-1] for code in range(32)}


class Source:
    """The text from `at` on is unread. Methods that return Waiting are called with `yield from`.

    `markers`: those around calls. Outside a string they end a value that lacks a bracket.
    """

    def __init__(self, markers: tuple[str, ...] = ()) -> None:
        self.markers = markers
        self.ended = False
        self._text = ""
        self._at = 0
        self._dropped = 0  # characters before _text
        self._kept: int | None = None  # position that `retry` may go back to

    def feed(self, piece: str) -> None:
        cut = self._at if self._kept is None else self._kept - self._dropped
        self._text = self._text[cut:] + piece
        self._at -= cut
        self._dropped += cut

    @property
    def position(self) -> int:
        """Characters read so far."""
        return self._dropped + self._at

    def keep(self) -> int:
        """Keep the text from here on, and return the position for `retry`."""
        self._kept = self.position
        return self._kept

    def retry(self, position: int) -> str:
        """Go back to a position, or return the text behind it where it is long. To search that again from each of many
        positions would take quadratic time."""
        start = position - self._dropped
        if self._at - start > _LONG:
            return self._text[start : self._at]
        self._at = start
        return ""

    def release(self) -> None:
        self._kept = None

    def back(self, text: str) -> None:
        """Unread a text that was read last."""
        self._at -= len(text)

    def more(self) -> Waiting[bool]:
        """Wait for more text. False: there is none."""
        if self.ended:
            return False
        yield
        return True

    def peek(self) -> Waiting[str]:
        """Return the next character, unread; empty at the end."""
        while self._at >= len(self._text):
            if not (yield from self.more()):
                return ""
        return self._text[self._at]

    def _space(self) -> Waiting[int]:
        """Return how many characters of white space come next."""
        size = 0
        while True:
            while self._at + size < len(self._text):
                if not self._text[self._at + size].isspace():
                    return size
                size += 1
            if not (yield from self.more()):
                return size

    def skip_space(self) -> Waiting[str]:
        """Skip white space, and return the next character, unread."""
        space = yield from self._space()  # first: a pause moves `_at`
        self._at += space
        return (yield from self.peek())

    def next_is(self, words: Sequence[str], offset: int = 0) -> Waiting[str]:
        """Return the longest of the words that comes next, unread; empty: none does."""
        while True:
            start = self._at + offset
            rest = self._text[start : start + max(map(len, words), default=0)]
            undecided = any(len(word) > len(rest) and word.startswith(rest) for word in words)
            if not undecided or not (yield from self.more()):
                return max((word for word in words if rest.startswith(word)), key=len, default="")

    def after_space(self, words: Sequence[str]) -> Waiting[str]:
        """Return the word that comes next behind white space, unread; empty: none does."""
        return (yield from self.next_is(words, (yield from self._space())))

    def take(self, words: Sequence[str]) -> Waiting[str]:
        """Read the word that comes next behind white space. Empty: none does, and nothing was read."""
        space = yield from self._space()
        word = yield from self.next_is(words, space)
        self._at += space + len(word) if word else 0
        return word

    def at_end(self) -> Waiting[bool]:
        """Return whether only white space is left."""
        size = yield from self._space()
        return self._at + size >= len(self._text)

    def until(self, words: tuple[str, ...], emit: Emit, limit: int | None = None) -> Waiting[str]:
        """Emit the text up to the first of the words, and read the word. Empty: the end came first, or `limit`
        characters."""
        pattern, longest, firsts = _search(words)
        last = None if limit is None else self.position + limit
        while True:
            text, at = self._text, self._at
            size = len(text) if last is None else min(len(text), last - self._dropped)
            found = pattern.search(text, at, size) if words else None
            stop = found.start() if found else size
            ended = self.ended or self._dropped + size == last
            if not ended:  # a word may have begun, before the one found or as a longer one
                tail = range(max(at, size - longest + 1), min(stop + 1, size))
                begun = (i for i in tail if text[i] in firsts and any(_begins(word, text, i) for word in words))
                if (held := next(begun, None)) is not None:
                    stop, found = held, None
            emit(text[at:stop])
            self._at = stop
            if found:
                self._at = found.end()
                return found[0]
            if ended or not (yield from self.more()):
                return ""

    def read_until(self, words: tuple[str, ...]) -> Waiting[tuple[str, str]]:
        """Return the text up to the first of the words, and the word, which is read."""
        parts: list[str] = []
        word = yield from self.until(words, parts.append)
        return "".join(parts), word

    def header(self, words: tuple[str, ...]) -> Waiting[tuple[str, str]]:
        """Return the short text up to the first of the words, and the word, which is read; empty: it is no header."""
        parts: list[str] = []
        word = yield from self.until(words, parts.append, _HEADER)
        return "".join(parts), word

    def nested(self, emit: Emit, language: Brackets = JSON) -> Waiting[bool]:
        """Emit the bracketed value that comes next. Brackets in strings are text, and control characters in strings are
        escaped. False: the end came first."""
        depth, quote = 0, ""
        outside, firsts = _outside(language.outside, self.markers)
        while True:
            pattern = language.inside[quote] if quote else outside
            match = pattern.search(self._text, self._at)
            if match and not quote and match[0] in firsts:
                emit(self._text[self._at : match.start()])
                self._at = match.start()
                if (yield from self.next_is(self.markers)):
                    return True
                match = pattern.match(self._text, self._at)  # the wait has moved it
            stop = len(self._text) if match is None else match.end()
            escape = match is not None and match[0] == "\\"
            if escape and stop == len(self._text) and not self.ended:
                stop, match = stop - 1, None
            elif escape:
                stop = min(stop + 1, len(self._text))
            piece = self._text[self._at : stop]
            emit(piece.translate(_CONTROL) if quote and language is JSON else piece)
            self._at = stop
            if match is None:
                if not (yield from self.more()):
                    return False
            elif match[0] in language.inside:
                quote = "" if quote else match[0]
            elif match[0] in "{[(":
                depth += 1
            elif match[0] in "}])":
                depth -= 1
                if depth <= 0:
                    return True

    def json_string(self) -> Waiting[str | None]:
        """Read a string in JSON. None: it has no end, or is malformed."""
        raw = ""
        self._at += 1
        while True:
            text, word = yield from self.read_until(("\\", '"'))
            raw += text.translate(_CONTROL)
            if word != "\\":
                break
            escaped = yield from self.peek()
            self._at += len(escaped)
            raw += word + escaped
        try:
            text = json.loads(f'"{raw}"') if word else None
        except ValueError:
            return None
        return text and text.encode("utf-8", "replace").decode()  # a lone surrogate has no UTF-8 form


@functools.cache
def _search(words: tuple[str, ...]) -> tuple[re.Pattern[str], int, frozenset[str]]:
    """Return a pattern for the first of the words, the length of the longest, and their first characters."""
    by_length = sorted(words, key=len, reverse=True)
    longest = len(by_length[0]) if words else 0
    return re.compile("|".join(map(re.escape, by_length))), longest, frozenset(word[0] for word in words)


@functools.cache
def _outside(brackets: re.Pattern[str], markers: tuple[str, ...]) -> tuple[re.Pattern[str], frozenset[str]]:
    """Return a pattern for brackets and markers, and the first characters of the markers."""
    firsts = frozenset(marker[0] for marker in markers)
    return re.compile("|".join((brackets.pattern, *map(re.escape, firsts)))), firsts


def _begins(word: str, text: str, at: int) -> bool:
    """Return whether the text ends, behind `at`, before the word does."""
    return len(text) - at < len(word) and word.startswith(text[at:])
