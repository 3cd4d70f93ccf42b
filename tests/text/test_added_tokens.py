"""Tokens that only the files beside a vocabulary name exist, with the ids and flags that transformers 5.19 gives them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sgl_jax.text.tokenizer import Tokenizer, load_tokenizer

_PLAIN = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
_LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "[BOS]", "eos_token": "[EOS]", "unk_token": "[UNK]"}
_CONFIG, _MAP, _ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
_CHAT = {"1000": {**_PLAIN, "content": "<|im_start|>"}, "1001": {**_PLAIN, "content": "<|im_end|>"}}


def listed(**tokens: dict[str, Any]) -> dict[str, Any]:
    """Fields of tokenizer_config.json: added_tokens_decoder by "t512"."""
    return {"added_tokens_decoder": {number[1:]: {**_PLAIN, **token} for number, token in tokens.items()}}


# base, files with the fields that replace or (null) remove its own, text; ids, eos, shown text
CASES: dict[str, tuple[str, dict[str, Any], str, list[int], int, str]] = {
    "named specials, one in an object": (
        "stories260k",
        {_CONFIG: {"pad_token": "<pad>", "cls_token": {**_PLAIN, "content": "<cls>", "lstrip": True}}},
        "a <cls> b<pad>",
        [261, 513, 410, 268, 512],
        2,
        "a  b",
    ),
    "a name of the model's own": (
        "stories260k",
        {_CONFIG: {"image_token": "<image>"}},
        "a<image>b",
        [261, 512, 268],
        2,
        "a b",
    ),
    "a list": (
        "stories260k",
        {_CONFIG: {"extra_special_tokens": ["<x>", "<y>"]}},
        "a<y> <x>",
        [261, 513, 410, 410, 512],
        2,
        "a  ",
    ),
    "an object": (
        "stories260k",
        {_CONFIG: {"extra_special_tokens": {"boi_token": "<boi>", "eoi_token": "<eoi>"}}},
        "a<eoi><boi>",
        [261, 513, 512],
        2,
        "a",
    ),
    "extra ones rule over additional ones": (
        "stories260k",
        {_CONFIG: {"extra_special_tokens": ["<x>"], "additional_special_tokens": ["<y>"]}},
        "<x><y>",
        [512, 410, 504, 422, 505],
        2,
        "<y>",
    ),
    "spaces beside it, and not special": (
        "stories260k",
        {
            _CONFIG: listed(
                t512={"content": "<x>", "lstrip": True, "rstrip": True}, t513={"content": "<y>", "special": False}
            )
        },
        "a  <x>  b <y> c",
        [261, 512, 268, 410, 513, 410, 280],
        2,
        "a b <y>  c",
    ),
    "ids with gaps": (
        "stories260k",
        {_CONFIG: listed(t520={"content": "<b>"}, t515={"content": "<a>"})},
        "<a><b>",
        [512, 513],
        2,
        "",
    ),
    "whole words only": (
        "stories260k",
        {_CONFIG: listed(t512={"content": "tag", "single_word": True, "special": False})},
        "tag tags tag",
        [512, 410, 259, 412, 428, 419, 410, 512],
        2,
        "tag  tags tag",
    ),
    "other flags": (
        "stories260k",
        {_CONFIG: listed(t2={"content": "</s>", "lstrip": True})},
        "a </s>b",
        [261, 2, 268],
        2,
        "a b",
    ),
    "special_tokens_map.json": (
        "stories260k",
        {
            _CONFIG: {"added_tokens_decoder": None},
            _MAP: {"eos_token": {**_PLAIN, "content": "<|end|>"}, "additional_special_tokens": ["<q>"]},
        },
        "a<q><|end|>",
        [261, 513, 512],
        512,
        "a",
    ),
    "added_tokens.json, of which one is known": (
        "tokenizers/qwen3",
        {_CONFIG: {"added_tokens_decoder": None}, _ADDED: {"<new>": 2026, "<|im_end|>": 2002}},
        "a<new> <|im_end|>b",
        [64, 2026, 220, 2002, 65],
        2002,
        "a<new> b",
    ),
    "a token of the vocabulary becomes special": (
        "tokenizers/qwen3",
        {_CONFIG: {"additional_special_tokens": ["the"]}},
        "on the day",
        [263, 220, 1782, 1899],
        2002,
        "on  day",
    ),
    "sentencepiece, listed": (
        "tokenizers/sentencepiece",
        {_CONFIG: {**_LLAMA, "added_tokens_decoder": _CHAT}},
        "<|im_start|>the king<|im_end|>\nand the",
        [1000, 943, 301, 407, 314, 1001, 4, 514, 306],
        2,
        "the king\nand the",
    ),
    "sentencepiece, added_tokens.json": (
        "tokenizers/sentencepiece",
        {
            _CONFIG: {**_LLAMA, "eos_token": "<|im_end|>"},
            _ADDED: {"<|im_start|>": 1000, "<|im_end|>": 1001},
        },
        "<|im_start|>the king<|im_end|>",
        [1000, 943, 301, 407, 314, 1001],
        1001,
        "<|im_start|>the king",
    ),
    "sentencepiece, a list": (
        "tokenizers/sentencepiece",
        {_CONFIG: {**_LLAMA, "additional_special_tokens": ["<a>", "<b>"]}},
        "the<b>king<a>",
        [306, 1001, 966, 314, 1000],
        2,
        "theking",
    ),
}


def load(folder: Path, base: Path, files: dict[str, Any]) -> Tokenizer:
    for name in ("tokenizer.json", _CONFIG, "config.json", "tokenizer.model"):
        if (base / name).exists():
            shutil.copy(base / name, folder)
    for name, fields in files.items():
        path = folder / name
        found = json.loads(path.read_text()) if path.exists() else {}
        if fields.get("added_tokens_decoder"):
            fields = fields | {
                "added_tokens_decoder": found.get("added_tokens_decoder", {}) | fields["added_tokens_decoder"]
            }
        path.write_text(json.dumps({key: value for key, value in (found | fields).items() if value is not None}))
    return load_tokenizer(str(folder))


@pytest.mark.parametrize("name", CASES)
def test_tokens_named_beside_the_vocabulary(stories260k: Path, tmp_path: Path, name: str) -> None:
    base, files, text, ids, eos, shown = CASES[name]
    tokenizer = load(tmp_path, stories260k.parent / base, files)
    assert tokenizer.encode(text, add_special_tokens=False) == ids
    assert (tokenizer.eos_token_id, tokenizer.decode(ids)) == (eos, shown)
    assert tokenizer.vocab_size > max(ids)


def test_tiktoken_takes_added_tokens_too(tokenizers: Path, tmp_path: Path) -> None:
    import base64

    from sgl_jax.text.bpe import BYTE_OF_CHAR

    vocab = json.loads((tokenizers / "qwen2.5" / "tokenizer.json").read_text())["model"]["vocab"]
    spelled = [bytes(BYTE_OF_CHAR[char] for char in token) for token in sorted(vocab, key=vocab.get)]
    lines = [base64.b64encode(token) + b" %d" % i for i, token in enumerate(spelled)]
    (tmp_path / "qwen.tiktoken").write_bytes(b"\n".join(lines))
    (tmp_path / _CONFIG).write_text(json.dumps({"additional_special_tokens": ["<tool>"], "eos_token": "<|im_end|>"}))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.encode("<tool><|im_end|>") == [2208, 2002]
    assert tokenizer.end_ids == (2002,)


def test_templates_see_the_special_tokens(stories260k: Path, tmp_path: Path) -> None:
    config = {"additional_special_tokens": ["<a>", {"content": "<b>"}], "pad_token": "<p>"}
    template = "{{ additional_special_tokens | join }}{{ pad_token }}"
    found = load(tmp_path, stories260k, {_CONFIG: {**config, "chat_template": template}})
    assert found.chat_template().render([]) == "<a><b><p>"
