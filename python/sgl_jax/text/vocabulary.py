"""Result of every reader of vocabularies: a tokenizer with its special tokens and chat template."""

import dataclasses

from tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Tokenizer built from a model's files, and their special tokens and template."""

    backend: Tokenizer
    special_tokens: dict[str, str] = dataclasses.field(default_factory=dict)  # by name: "eos_token"
    chat_template: str | None = None
    is_sentencepiece: bool = False


def present(**tokens: str | None) -> dict[str, str]:
    """Return the tokens that are not None, by name."""
    return {name: token for name, token in tokens.items() if token is not None}
