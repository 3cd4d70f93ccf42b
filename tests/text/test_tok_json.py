"""Grok-2's tokenizer.tok.json gives the ids of merging by rank, spelled out in plain Python."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from sgl_jax.text.tokenizer import TokenizerError, load_tokenizer

WORDS = [
    "the",
    " the",
    "then",
    " a",
    "aa",
    "aaa",
    "aaaa",
    "ab",
    "aba",
    "bab",
    "é",
    " été",
    "日本",
    "\n\n",
    "  ",
    "in",
    "ing",
]
SPECIAL = ["<|pad|>", "<|separator|>", "<|eos|>", "<|control7|>", "<|image|>"]


def vocabulary() -> dict[bytes, int]:
    """Return single bytes, and each word with all its beginnings, so that merging can reach it."""
    tokens = [bytes([byte]) for byte in range(256)]
    for word in WORDS:
        encoded = word.encode()
        tokens += [encoded[:n] for n in range(2, len(encoded) + 1)]
    return {token: i + len(SPECIAL) for i, token in enumerate(dict.fromkeys(tokens))}


def write(folder: Path, **changes) -> Path:
    folder.mkdir()
    stored = {
        "regular_tokens": [{"bytes": list(token), "token": i} for token, i in vocabulary().items()],
        "special_tokens": [{"bytes": list(token.encode()), "token": i} for i, token in enumerate(SPECIAL)],
        "word_split": "V1",
        "vocab_size": len(vocabulary()) + len(SPECIAL),
    }
    (folder / "tokenizer.tok.json").write_text(json.dumps(stored | changes))
    return folder


def merged(word: bytes, ranks: dict[bytes, int]) -> list[int]:
    """Merge by tiktoken's rule: a word that is a token stays whole; else the leftmost pair of lowest rank comes first."""
    parts = [word] if word in ranks else [word[i : i + 1] for i in range(len(word))]
    while True:
        pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]
        if not pairs:
            return [ranks[part] for part in parts]
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def test_words_are_merged_by_rank(tmp_path: Path) -> None:
    tokenizer, ranks, rng = load_tokenizer(str(write(tmp_path / "model"))), vocabulary(), np.random.default_rng(0)
    for _ in range(300):
        word = "".join(rng.choice(list("aabbthenigé日本"), rng.integers(1, 12)))  # letters alone: one word
        assert tokenizer.encode(word) == merged(word.encode(), ranks)
        assert tokenizer.decode(tokenizer.encode(word)) == word


def test_text_is_split_as_v1_says_and_comes_back(tmp_path: Path) -> None:
    tokenizer, ranks = load_tokenizer(str(write(tmp_path / "model"))), vocabulary()
    text = "the then's  12 été!!\n\n the\x00😀"
    words = ["the", " then", "'s", " ", " ", "1", "2", " été", "!!\n\n", " the", "\x00😀"]
    assert tokenizer.encode(text) == [i for word in words for i in merged(word.encode(), ranks)]
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_only_known_special_tokens_are_found_in_text(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(write(tmp_path / "model")))
    assert tokenizer.encode("<|separator|><|control7|><|eos|>") == [1, 3, 2]
    assert 4 not in tokenizer.encode("<|image|>")
    assert tokenizer.eos_token_id == 2
    allowed = load_tokenizer(str(write(tmp_path / "more", default_allowed_special=[list(b"<|image|>")])))
    assert allowed.encode("<|image|>") == [4]
    assert tokenizer.decode([1, 5 + 97, 4], skip_special_tokens=True) == "a<|image|>"


def test_chats_are_written_as_the_model_saw_them(tmp_path: Path) -> None:
    folder = write(tmp_path / "model")
    turns = [("system", " Be brief. "), ("user", "Hi\n"), ("assistant", " Hello "), ("user", "Bye")]
    messages = [{"role": role, "content": text} for role, text in turns]
    text = load_tokenizer(str(folder)).chat_template().render(messages, add_generation_prompt=True)
    end = "<|separator|>\n\n"
    assert text == f"System: Be brief.{end}Human: Hi{end}Assistant:  Hello {end}Human: Bye{end}Assistant:"
    (folder / "chat_template.jinja").write_text("own")
    assert load_tokenizer(str(folder / "tokenizer.tok.json")).chat_template().render(messages) == "own"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"word_split": "V2"}, "word_split='V2'"),
        ({"vocab_size": 9}, "vocab_size is 9"),
    ],
)
def test_what_is_not_known_is_refused(tmp_path: Path, changes: dict, named: str) -> None:
    with pytest.raises(TokenizerError, match=named):
        load_tokenizer(str(write(tmp_path / "model", **changes)))
