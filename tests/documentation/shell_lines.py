"""Reader of the commands in the documentation: blocks of code, and commands inside of sentences."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAMS = ("python", "python3", "sgl-jax", "make", "curl", "uv", "pip", "docker", "kubectl", "sky", "git")
_SHELLS = ("", "bash", "sh", "console")  # languages of blocks that may hold commands
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_SPAN = re.compile(r"`([^`\n]+)`")
_VARIABLE = re.compile(r"[A-Z][A-Z0-9_]*=")


class Command(NamedTuple):
    place: str  # page and line
    words: tuple[str, ...]  # the program first
    environ: dict[str, str]

    @property
    def program(self) -> str:
        return Path(self.words[0]).name

    def __str__(self) -> str:
        return f"{self.place} {' '.join(self.words[:4])}"


def pages() -> list[Path]:
    return [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]


def name(page: Path) -> str:
    return page.relative_to(REPOSITORY).as_posix()


def in_blocks(page: Path) -> Iterator[Command]:
    """Yield the commands in the page's blocks; lines of other programs, such as output, are left out."""
    text = page.read_text(encoding="utf-8")
    for block in _BLOCK.finditer(text):
        if block[1] in _SHELLS:
            yield from read(block[2], name(page), text.count("\n", 0, block.start(2)) + 1)


def read(text: str, place: str, first_line: int = 1) -> Iterator[Command]:
    """Yield the commands of a script. A quoted text or a backslash makes a command go on in the next line."""
    lines = iter(enumerate(text.splitlines(), first_line))
    for number, line in lines:
        if not _begins_with_a_program(line):
            continue
        while (words := _split(line)) is None:
            line += "\n" + next(lines)[1]
        for command in _simple_commands(words):
            environ = dict(word.split("=", 1) for word in itertools.takewhile(_VARIABLE.match, command))
            rest = command[len(environ) :]
            if rest and Path(rest[0]).name in PROGRAMS:
                yield Command(f"{place}:{number}", tuple(rest), environ)


def _begins_with_a_program(line: str) -> bool:
    words = [word for word in line.split() if not _VARIABLE.match(word)]
    return bool(words) and Path(words[0]).name in PROGRAMS


def _split(line: str) -> list[str] | None:
    """Words of a whole command; None: it goes on."""
    if line.endswith("\\"):
        return None
    try:
        return shlex.split(line.replace("\\\n", " "), comments=True)
    except ValueError:  # a quotation is open
        return None


def _simple_commands(words: list[str]) -> Iterator[list[str]]:
    command: list[str] = []
    for word in [*words, ";"]:
        if word in ("&&", "||", "|", ";", "&"):
            yield command
            command = []
        elif not word.startswith(">") and word != "[flags]":
            command.append(word)


def spans(page: Path) -> list[str]:
    """Short code in the page's sentences and tables."""
    return _SPAN.findall(_BLOCK.sub("", page.read_text(encoding="utf-8")))


def in_sentences(page: Path) -> list[Command]:
    """Commands in the page's sentences, which may be unfinished: `python -m sgl_jax.compile --plan`."""
    found = (read(span, name(page)) for span in spans(page) if " " in span)
    return [command for commands in found for command in commands]
