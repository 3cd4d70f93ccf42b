"""Docstrings, comments and commit titles begin so that a reader knows at once what they are about."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import tokenize
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
FOLDERS = ("python/sgl_jax", "tests", "benchmarks", "docs", "examples")
RIDDLES = {"What", "That", "Of", "Those"}  # first words that make a reader wait for the noun

TITLES_SINCE = "c17c309da3"  # the last commit before this test: older titles stay as they are
TITLE_LENGTH = 72
LABEL = re.compile(r"(Merge branch|Format|Types)\b|[A-Za-z]+(\(\w+\))?!?:")  # "Docs: …" names a place, not a change


def sources() -> list[tuple[str, str]]:
    """Each committed module by its path in the repository, with its text."""
    found = (file for folder in FOLDERS for file in sorted((REPOSITORY / folder).rglob("*.py")))
    return [(file.relative_to(REPOSITORY).as_posix(), file.read_text(encoding="utf-8")) for file in found]


def first_word(text: str) -> str:
    return re.split(r"\W", text.strip(), maxsplit=1)[0]


def docstring_openings(source: str) -> list[str]:
    """The first word of each docstring."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = (ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, documented))
    return [first_word(text) for text in docstrings if text]


def comment_openings(source: str) -> list[str]:
    """The first word of each comment, with a capital; the lines of a block are one comment."""
    found, block = [], 0  # block: the line on which a block of comments may go on
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            line, column = token.start
            alone = not token.line[:column].strip()
            if not (alone and line == block):
                found.append(first_word(token.string.removeprefix("#")).capitalize())
            block = line + 1 if alone else 0
    return found


def commit_titles() -> list[str]:
    """Titles of the commits since TITLES_SINCE, merges left out; none in an archive or a clone that is too shallow."""
    return _git("log", "--no-merges", "--format=%s", f"{TITLES_SINCE}..HEAD").stdout.splitlines()


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False)


def wrong_title(title: str) -> bool:
    return len(title) > TITLE_LENGTH or LABEL.match(title) is not None


def test_no_docstring_begins_with_a_relative_clause() -> None:
    found = {name: sorted(RIDDLES.intersection(docstring_openings(source))) for name, source in sources()}
    assert {name: words for name, words in found.items() if words} == {}


def test_no_comment_begins_with_a_relative_clause() -> None:
    found = {name: sorted(RIDDLES.intersection(comment_openings(source))) for name, source in sources()}
    assert {name: words for name, words in found.items() if words} == {}


def test_commit_titles_are_short_and_say_what_is_different() -> None:
    assert [title for title in commit_titles() if wrong_title(title)] == []


@pytest.mark.parametrize(
    "source",
    ['"""What it is."""', 'def f():\n    """Of a row."""', 'class A:\n    """Those: x."""', '"""That\'s it."""'],
)
def test_the_check_of_docstrings_sees_them(source: str) -> None:
    assert RIDDLES.intersection(docstring_openings(source))


def test_the_check_of_comments_sees_where_each_begins() -> None:
    source = 'a = 1  # of a row\n# What it is,\n# that nobody knows.\n\n# Bytes\n# of a page\nb = "# Those"  # bytes\n'
    assert comment_openings(source) == ["Of", "What", "Bytes", "Bytes"]


@pytest.mark.parametrize(
    ("title", "wrong"),
    [
        ("Evict only unlocked leaves", False),
        ("Split the scheduler: admission and results in files of their own", False),
        ("check_env: verdicts and notices are tables", False),
        ("Formatting follows ruff 0.14", False),
        ("x" * 73, True),
        ("Docs: lines", True),
        ("fix(engine): lines", True),
        ("Format", True),
        ("Types", True),
        ("Merge branch 'x'", True),
    ],
)
def test_the_check_of_titles_sees_them(title: str, wrong: bool) -> None:
    assert wrong_title(title) == wrong
