"""Result of every reader of vocabularies: a tokenizer with its special tokens and chat template."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Tokenizer built from a model's files, and their special tokens and template."""

    backend: Tokenizer
    special_tokens: dict[str, Any] = dataclasses.field(default_factory=dict)  # by name: "eos_token"; a text or several
    chat_template: str | None = None
    is_sentencepiece: bool = False
    named_templates: Mapping[str, str] = dataclasses.field(default_factory=dict)  # further ones: "tool_use"
    add_bos: bool | None = None  # None: as the backend's own post-processor does
    ends: tuple[str, ...] = ()  # tokens that end an answer, beside eos
    class_name: str | None = None  # the tokenizer's in transformers; None: the files do not say


def present(**tokens: str | None) -> dict[str, str]:
    """Return the tokens that are not None, by name."""
    return {name: token for name, token in tokens.items() if token is not None}
