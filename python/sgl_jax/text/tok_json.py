"""Grok-2's tokenizer.tok.json: byte-level BPE as tokens with ranks, and tokens that are matched in the text as they are.

Source of the format: github.com/sgl-project/sglang, python/sglang/srt/tokenizer/tiktoken_tokenizer.py. Every adjacent pair
whose bytes together are a token may be merged; the pair whose token has the lowest id goes first.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import BPE

from sgl_jax.models.model_errors import ModelError
from sgl_jax.text.bpe_merges import merges_of
from sgl_jax.text.byte_level import CHAR_OF_BYTE, QWEN2_WORDS, by_regex

NAME = "tokenizer.tok.json"
EOS = "<|eos|>"

# Where the folder has no template of its own.
CHAT_TEMPLATE = """\
{%- set names = {'system': 'System', 'user': 'Human', 'assistant': 'Assistant'} -%}
{%- for message in messages if message.role in names -%}
{%- set text = message.content if message.role == 'assistant' else message.content | trim -%}
{{- names[message.role] + ': ' + text + '<|separator|>\\n\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}"""

_SPLITS = {"V1": QWEN2_WORDS}  # by the name in word_split
# Special tokens that a text may hold; the others are spelled with regular tokens there.
_ALLOWED = {
    *("<|pad|>", "<|separator|>", EOS),
    *(f"<|reserved_{i}|>" for i in range(3, 128)),
    *(f"<|control{i}|>" for i in range(1, 705)),
}


def load_tok_json(path: Path) -> Tokenizer:
    """Raises ModelError where the file cannot be rebuilt exactly."""
    stored = json.loads(path.read_text(encoding="utf-8"))
    if stored.get("word_split") not in _SPLITS:
        raise ModelError(f"{path} has word_split={stored.get('word_split')!r}; known are {', '.join(_SPLITS)}")
    regular = {bytes(token["bytes"]): int(token["token"]) for token in stored["regular_tokens"]}
    special = {bytes(token["bytes"]): int(token["token"]) for token in stored["special_tokens"]}
    size = stored.get("vocab_size", len(regular) + len(special))
    if len(regular | special) != size or len({*regular.values(), *special.values()}) != size:
        raise ModelError(
            f"{path} has {len(regular)} regular and {len(special)} special tokens, some twice or too few: "
            f"its vocab_size is {size}"
        )
    allowed = _ALLOWED | {bytes(spelled).decode() for spelled in stored.get("default_allowed_special", ())}
    return byte_bpe(regular, special, stored.get("pat_str") or _SPLITS[stored["word_split"]], allowed)


def byte_bpe(ranks: dict[bytes, int], special: dict[bytes, int], split: str, allowed: set[str]) -> Tokenizer:
    """The tokenizer that merges by rank. `special` tokens in `allowed` are found in texts before they are split."""
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ModelError(f"the vocabulary has no token for the byte {missing[0]}, which every byte-level one has")
    spelled = {token: "".join(CHAR_OF_BYTE[byte] for byte in token) for token in ranks | special}
    merges = [(spelled[a], spelled[b]) for a, b in merges_of(ranks)]
    vocabulary = {spelled[token]: i for token, i in (ranks | special).items()}
    tokenizer = Tokenizer(BPE(vocabulary, merges, fuse_unk=False, ignore_merges=True))
    tokenizer.pre_tokenizer = by_regex(split)()
    tokenizer.decoder = decoders.ByteLevel()
    found: list[Any] = [
        AddedToken(t.decode(), special=True, normalized=False) for t in special if t.decode() in allowed
    ]
    tokenizer.add_tokens(found)
    return tokenizer
