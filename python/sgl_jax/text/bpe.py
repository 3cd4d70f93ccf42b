"""Parts of BPE tokenizers: merges from ranks, bytes as printable characters, patterns that cut text into words."""

import itertools
import math
from collections.abc import Mapping

from tokenizers import Regex, pre_tokenizers

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_WORDS = _CONTRACTIONS + _LETTERS + r"|\p{N}{1,3}" + _REST
QWEN2_WORDS = _CONTRACTIONS + _LETTERS + r"|\p{N}" + _REST


def by_regex(*patterns: str) -> pre_tokenizers.PreTokenizer:
    """Return a pre-tokenizer that splits by each pattern in turn and then spells bytes as printable characters."""
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _byte_of_char() -> dict[str, int]:
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_OF_CHAR = _byte_of_char()  # inverse of GPT-2's table of printable characters
CHAR_OF_BYTE = {byte: char for char, byte in BYTE_OF_CHAR.items()}


def merges_of(ranks: Mapping[str, float]) -> list[tuple[str, str]]:
    """Return the two tokens that each token of several characters is merged from, in order of rank; low ranks merge
    first.

    The pair is found by merging the token's own characters. In a longer text merges inside the token come in the same
    order. A token that merging never reaches has no pair.
    """
    merges = []
    for token, _ in sorted(ranks.items(), key=lambda item: item[1]):
        parts = list(token)
        while len(parts) > 2:
            best, at = min((ranks.get(a + b, math.inf), i) for i, (a, b) in enumerate(itertools.pairwise(parts)))
            if best == math.inf:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges
