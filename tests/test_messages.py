"""The committed list of messages is the source's, so that the diff of one file shows every rewording."""

from __future__ import annotations

import ast

import pytest

from messages import SNAPSHOT, messages, says, texts


def test_the_list_of_messages_is_up_to_date() -> None:
    """Fails after a message changes until `make messages` has run; read the diff then."""
    found = messages()
    committed = SNAPSHOT.read_text(encoding="utf-8").splitlines()
    assert sorted(set(committed) - set(found)) == []
    assert sorted(set(found) - set(committed)) == []
    assert committed == found
    assert len(committed) > 800


def test_messages_of_every_sort_are_found() -> None:
    found = messages()
    for kind in ("IndexError", "warning", "About", "page_size", "OTHERWISE", "Feature", "unused_devices_line"):
        assert any(f": {kind}: " in line for line in found), kind
    assert any(line.startswith("tools/environment/verdicts.py: ") for line in found)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('raise Bad(f"--a is {self.a:.2f}; it must " + rule)', [("raise Bad", "--a is {self.a:.2f}; it must {rule}")]),
        ('raise bad(ValueError("too far")) from None', [("raise bad", "too far")]),
        ('logger.warning("%s is %d", a, b)', [("warning", "%s is %d")]),
        ('logger.debug("%s is %d", a, b)', []),
        ('TABLE = {"a b": Rule(f"{x!r} of")}', [("TABLE", "a b"), ("Rule", "{x!r} of")]),
        ('def f(x: Float[Array, "T N"]) -> str:\n    """Return it."""\n    return a + "b c"', [("f", "{a}b c")]),
    ],
)
def test_texts_have_their_kind_and_their_fields(source: str, expected: list[tuple[str, str]]) -> None:
    assert list(texts(ast.parse(source), "module")) == expected


@pytest.mark.parametrize(
    ("pinned", "there"),
    [
        ("--page-size … 48 … 1024", True),
        ("--page-size … 1024 … 48", False),
        ("--page-size … 4 … 1024", False),
        ("--page", False),
        ("page", False),
        ("is 48; it", True),
        ("power of two", True),
        ("pow", False),
    ],
)
def test_pieces_are_pinned_in_order_and_as_whole_words(pinned: str, there: bool) -> None:
    assert says("--page-size is 48; it must be a power of two between 1 and 1024", pinned) == there
