"""Vocabulary as the grammar library needs it: the bytes of every token, as a tree, and the tokens that end an answer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from sgl_jax.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLTokenizer


def token_tree(tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Iterable[int]) -> LLTokenizer:
    """Build the tree of a vocabulary, which takes seconds if it is large. `vocab_size` and `eos_token_ids` are the model's.
    Raises ValueError where no token ends an answer."""
    from llguidance import LLTokenizer

    ends = sorted({token for token in (*eos_token_ids, *tokenizer.end_ids) if token < vocab_size})
    if not ends:
        raise ValueError("the model has no token that ends an answer, so no grammar can")
    size = max(vocab_size, tokenizer.vocab_size)
    return LLTokenizer(tokenizer.backend.to_str(), n_vocab=size, eos_token=ends)
