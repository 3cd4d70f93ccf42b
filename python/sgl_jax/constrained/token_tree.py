"""TokenTree as the grammar library needs it: the bytes of every token, as a tree, and the tokens that end an answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from sgl_jax.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLTokenizer

# Tokens of which the library decides at once, in place of one by one: those of white space, and those of 1 to N characters
# within a JSON string. More lengths than its own two help where a string has a greatest length.
_IN_STRING = r'[^"\\\x00-\x1F\x7F]'
_SLICES = [r"[\x20\x0A\x0D\x09]+", *(f"{_IN_STRING}{{1,{n}}}" for n in (2, 4, 6, 8, 10, 16)), f"{_IN_STRING}+"]


@dataclasses.dataclass(frozen=True)
class TokenTree:
    tree: LLTokenizer
    marks: Mapping[str, int]  # tokens that no text matches, by their text
    ends: tuple[int, ...]  # tokens that end an answer


def token_tree(tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Iterable[int]) -> TokenTree:
    """Build the tree of a vocabulary, which takes seconds if it is large. `vocab_size` and `eos_token_ids` are the model's.
    Raises ValueError where no token ends an answer."""
    from llguidance import LLTokenizer

    ends = sorted({token for token in (*eos_token_ids, *tokenizer.end_ids) if token < vocab_size})
    if not ends:
        raise ValueError("the model has no token that ends an answer, so no grammar can")
    size = max(vocab_size, tokenizer.vocab_size)
    tree = LLTokenizer(tokenizer.backend.to_str(), n_vocab=size, eos_token=ends, slices=_SLICES)
    marks = {text: token for token, text in tokenizer.added_tokens.items() if tree.is_special_token(token)}
    return TokenTree(tree, marks, tuple(ends))
