"""Events come out the same wherever the bytes are cut."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgl_jax.tools.benchmark.event_stream import EventParser

STREAM = (
    b": a comment\n\n"
    b'data: {"a": 1}\n\n'
    b"event: news\r\nid: 7\r\ndata:two\r\ndata:  lines\r\n\r\n"
    b"data: \xe2\x82\xac\r\rdata\n\n"
    b"data: [DONE]\n\n"
    b"data: never ended"
)
EVENTS = [b'{"a": 1}', b"two\n lines", b"\xe2\x82\xac", b"", b"[DONE]"]


def parsed(chunks: list[bytes]) -> list[bytes]:
    parser = EventParser()
    return [event for chunk in chunks for event in parser.feed(chunk)]


def test_whole_and_byte_by_byte() -> None:
    assert parsed([STREAM]) == EVENTS
    assert parsed([STREAM[i : i + 1] for i in range(len(STREAM))]) == EVENTS


@given(st.lists(st.integers(0, len(STREAM)), max_size=8))
def test_cut_anywhere(cuts: list[int]) -> None:
    at = [0, *sorted(cuts), len(STREAM)]
    assert parsed([STREAM[start:end] for start, end in itertools.pairwise(at)]) == EVENTS


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_an_event_comes_with_its_empty_line_and_not_later(end: bytes) -> None:
    parser = EventParser()
    assert parser.feed(b"data: x" + end) == []
    assert parser.feed(end) == [b"x"]
