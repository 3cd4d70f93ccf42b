"""Offsets of tokens in the text of a completion, in characters."""

from __future__ import annotations

from itertools import pairwise

import openai
import pytest
from live_server import tokenizer

from sgl_jax.server.completion_scores import prompt_offsets

STORIES = tokenizer()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", [0]),
        ("Once upon a time", [0, 0, 4, 9, 11]),
        ("a 日é", [0, 0, 1, 2, 2, 2, 3]),  # space, three bytes of one character, and a character of one token
        (" 🎉!", [0, 0, 0, 1, 1, 1, 1, 2]),
        ("e\u0301 on", [0, 0, 1, 1, 2]),  # the accent is a character of its own
        ("\n\nx", [0, 0, 0, 1, 2]),  # the tokenizer's own space before the text takes no room
        ("  two", [0, 0, 0, 1, 3, 4]),
        ("on</s>\nx", [0, 0, 2, 6, 6, 7]),  # the text spells a special token
    ],
)
def test_offsets_are_places_in_the_prompt(text: str, expected: list[int]) -> None:
    assert prompt_offsets(STORIES, STORIES.encode(text), text) == expected


def test_a_text_that_the_tokenizer_normalises_keeps_its_places() -> None:
    ids = STORIES.encode("Once upon a time", add_special_tokens=False)
    assert prompt_offsets(STORIES, ids, "Once   upon\u00a0a time") == [0, 4, 11, 13]
    assert prompt_offsets(STORIES, ids, "Once") == [0, 4, 4, 4]  # never behind the end


@pytest.mark.parametrize(
    "prompt", ["Once upon a time", "a </s>naïve 日本", [1, 403, 407, 261, 2, 378], [[1, 403], [2]]]
)
@pytest.mark.parametrize(
    "more", [{}, {"echo": True}, {"echo": True, "n": 2}, {"stop": "upon a"}, {"echo": True, "stop": "ime"}]
)
@pytest.mark.parametrize("skip_special_tokens", [True, False])
def test_a_streams_offsets_are_those_of_the_whole_and_lie_in_the_text(
    slow_client: openai.OpenAI, prompt: str | list[int], more: dict, skip_special_tokens: bool
) -> None:
    asked = {"model": "stories", "prompt": prompt, "logprobs": 1, "max_tokens": 9, **more}
    asked["extra_body"] = {"ignore_eos": True, "skip_special_tokens": skip_special_tokens}
    whole = slow_client.completions.create(**asked).choices
    parts: list[tuple[str, list[str], list[int]]] = [("", [], []) for _ in whole]
    for chunk in slow_client.completions.create(**asked, stream=True):
        [choice] = chunk.choices
        text, tokens, offsets = parts[choice.index]
        if choice.logprobs is not None:
            tokens += choice.logprobs.tokens
            offsets += choice.logprobs.text_offset
        parts[choice.index] = text + choice.text, tokens, offsets
    assert parts == [(each.text, each.logprobs.tokens, each.logprobs.text_offset) for each in whole]
    for text, tokens, offsets in parts:
        assert 0 <= offsets[0] <= offsets[-1] <= len(text)
        for token, (start, end) in zip(tokens, pairwise([*offsets, len(text)]), strict=True):
            if token.isalpha() and end < len(text):  # neither cut by a stop string nor part of a character
                assert text[start:end].strip() == token.strip()
