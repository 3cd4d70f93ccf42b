"""Parts that byte-level BPE vocabularies share: bytes spelled as printable characters, and patterns that cut text into words."""

from __future__ import annotations

from collections.abc import Callable

from tokenizers import Regex, pre_tokenizers

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_WORDS = _CONTRACTIONS + _LETTERS + r"|\p{N}{1,3}" + _REST
QWEN2_WORDS = _CONTRACTIONS + _LETTERS + r"|\p{N}" + _REST


def by_regex(*patterns: str) -> Callable[[], pre_tokenizers.PreTokenizer]:
    """Makes splitters by these patterns, one after the other, that then spell bytes."""
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return lambda: pre_tokenizers.Sequence([*splits, to_bytes])


def _byte_of_char() -> dict[str, int]:
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_OF_CHAR = _byte_of_char()  # GPT-2's printable stand-in for each byte, inverted
CHAR_OF_BYTE = {byte: char for char, byte in BYTE_OF_CHAR.items()}
