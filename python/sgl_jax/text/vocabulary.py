"""The result of every reader of vocabularies: a tokenizer, and what the files say beside it."""

from __future__ import annotations

import dataclasses

from tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """A tokenizer built from a model's files. A text it encodes gets bos or eos only where the files ask for them."""

    backend: Tokenizer
    special_tokens: dict[str, str] = dataclasses.field(default_factory=dict)  # by name ("eos_token"), as far as known
    chat_template: str | None = None
    is_sentencepiece: bool = False


def present(**tokens: str | None) -> dict[str, str]:
    """Return the tokens that are not None, by name."""
    return {name: token for name, token in tokens.items() if token is not None}
