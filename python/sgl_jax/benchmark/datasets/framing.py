"""What stands around a prompt's text: the model's chat template and --prompt-suffix."""

from __future__ import annotations

from sgl_jax.benchmark.errors import BenchmarkError
from sgl_jax.text.chat_template import TemplateError
from sgl_jax.text.tokenizer import Tokenizer

type Messages = list[dict[str, str]]


class Framing:
    """Called with a prompt's text, it gives the text to send."""

    def __init__(self, tokenizer: Tokenizer, apply_chat_template: bool = False, suffix: str = ""):
        self._tokenizer, self._suffix = tokenizer, suffix
        self._is_chat = apply_chat_template

    def __call__(self, text: str) -> str:
        text += self._suffix
        return self.render([{"role": "user", "content": text}]) if self._is_chat else text

    def conversation(self, messages: Messages) -> str | Messages:
        """The text to send with --apply-chat-template, else the messages, the suffix after the last one."""
        if self._suffix:
            messages = [*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + self._suffix}]
        return self.render(messages) if self._is_chat else messages

    def render(self, messages: Messages) -> str:
        """As the model's template writes it, but for a BOS at the beginning where encoding the text adds one."""
        tokenizer = self._tokenizer
        try:
            text = tokenizer.chat_template().render(messages)
        except TemplateError as error:
            raise BenchmarkError(f"--apply-chat-template: {error}") from error
        bos = tokenizer.bos_token
        if bos is not None and tokenizer.encode("")[:1] == [tokenizer.bos_token_id]:
            text = text.removeprefix(bos)
        return text
