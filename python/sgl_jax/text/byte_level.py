"""Byte-level BPE: bytes spelled as printable characters, patterns that cut text into words, and merging by rank."""

from __future__ import annotations

from collections.abc import Mapping

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from sgl_jax.text.bpe_merges import merges_of

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_WORDS = _CONTRACTIONS + _LETTERS + r"|\p{N}{1,3}" + _REST
QWEN2_WORDS = _CONTRACTIONS + _LETTERS + r"|\p{N}" + _REST


def by_regex(*patterns: str) -> pre_tokenizers.PreTokenizer:
    """Return a splitter by these patterns, one after the other, that then spells bytes."""
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _byte_of_char() -> dict[str, int]:
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_OF_CHAR = _byte_of_char()  # GPT-2's printable stand-in for each byte, inverted
CHAR_OF_BYTE = {byte: char for char, byte in BYTE_OF_CHAR.items()}


def bpe_of_ranks(ranks: Mapping[bytes, int], special: Mapping[bytes, int], words: str) -> Tokenizer:
    """Return a tokenizer that joins the neighbours whose joined token has the lowest rank, as tiktoken does.

    A rank is the token's id, too. A word, which `words` cuts, stays whole if it is a token. `special` tokens have ids but are
    never made by joining.
    """
    spelled = {"".join(CHAR_OF_BYTE[byte] for byte in token): i for token, i in {**ranks, **special}.items()}
    of_ranks = {"".join(CHAR_OF_BYTE[byte] for byte in token): rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(BPE(spelled, merges_of(of_ranks), ignore_merges=True))
    tokenizer.pre_tokenizer = by_regex(words)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
