"""Texts to token ids, with errors that name the parameter the text came in."""

from sgl_jax.engine.generation import PromptTooLong
from sgl_jax.request import InvalidParameter
from sgl_jax.text.tokenizer import TextTooLong, Tokenizer, TokenizerError


def encoded(
    tokenizer: Tokenizer, text: str, name: str, context_length: int, add_special_tokens: bool = True
) -> list[int]:
    """Encode a prompt. Raises PromptTooLong, before all of it is encoded, if it is plainly longer than the context, and
    InvalidParameter for a text that is not valid Unicode."""
    try:
        return tokenizer.encode(text, add_special_tokens, context_length)
    except TextTooLong as error:
        raise PromptTooLong(
            name, "the prompt is too long: {name} has {reason}", name=name, reason=str(error)
        ) from error
    except TokenizerError as error:
        raise InvalidParameter(name, f"{name}: {error}") from error
