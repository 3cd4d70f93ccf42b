"""Sources of prompts of a wanted length: a text, cut to an exact number of tokens and framed, or drawn token ids."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path

import numpy as np

from sgl_jax.text.chat_template import TemplateError
from sgl_jax.text.tokenizer import Tokenizer
from sgl_jax.tools.benchmark.terminal import BenchmarkError

_NUM_WALKS = 24  # cuts tried from one beginning before another is taken
_NUM_STARTS = 50  # beginnings tried for one prompt
_MOST_TEXT = 2**22  # characters read of a file of the user's
_SPREAD = 64  # without a tokenizer the outer 1/64 of the vocabulary at either end is left out

type Messages = list[dict[str, str]]


class Framing:
    """The text around a prompt's text: the model's chat template and --prompt-suffix. Called with the text, it gives
    the text to send."""

    def __init__(self, tokenizer: Tokenizer, apply_chat_template: bool = False, suffix: str = ""):
        self.tokenizer, self._is_chat, self._suffix = tokenizer, apply_chat_template, suffix

    def __call__(self, text: str) -> str:
        text += self._suffix
        return self.render([{"role": "user", "content": text}]) if self._is_chat else text

    def conversation(self, messages: Messages) -> str | Messages:
        """Return the text to send with --apply-chat-template, else the messages, the suffix after the last one."""
        messages = [*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + self._suffix}]
        return self.render(messages) if self._is_chat else messages

    def render(self, messages: Messages) -> str:
        """Return the text that the model's template writes, but for a BOS at its beginning where encoding it adds one."""
        tokenizer = self.tokenizer
        try:
            text = tokenizer.chat_template().render(messages)
        except TemplateError as error:
            raise BenchmarkError(f"--apply-chat-template: {error}") from error
        if tokenizer.bos_token is not None and tokenizer.encode("")[:1] == [tokenizer.bos_token_id]:
            text = text.removeprefix(tokenizer.bos_token)
        return text

    def ids(self, prompt: str | list[int] | Messages) -> list[int]:
        """Return a prompt's tokens; those of messages are what the model's template writes."""
        if isinstance(prompt, list) and isinstance(prompt[0], int):
            return prompt
        return self.tokenizer.encode(prompt if isinstance(prompt, str) else self.render(prompt))

    def count_answer(self, answer: str) -> int:
        return len(self.tokenizer.encode(answer, add_special_tokens=False))


@functools.cache
def bundled_text() -> str:
    """Return the first chapters of War and Peace in the Maudes' translation, which is in the public domain."""
    return resources.files("sgl_jax.tools.benchmark").joinpath("data", "war_and_peace.txt").read_text(encoding="utf-8")


class TextSource:
    """Pieces of a text, the bundled one or a file's, each beginning at another word, so that no two share a long prefix.

    A piece's length is what `tokenizer.encode` counts, as the server does: a BOS that it adds is counted too.
    """

    def __init__(self, tokenizer: Tokenizer, rng: np.random.Generator, path: str | None = None):
        self._tokenizer = tokenizer
        self._text = _text_of(path) if path else bundled_text()
        words = [match.start() for match in re.finditer(r"\S+", self._text)]
        self._starts = iter(rng.permutation(words).tolist())

    def piece(self, num_tokens: int, frame: Callable[[str], str] = str, overhead: int | None = None) -> str:
        """Return `frame` of some text, of exactly `num_tokens` tokens; the source goes back to its beginning at its end.

        `overhead` is `count(frame(""))`, where it is known already. Raises BenchmarkError when that is too long
        itself, and when every word was a beginning already.
        """
        overhead = self.count(frame("")) if overhead is None else overhead
        if num_tokens <= overhead:
            raise BenchmarkError(
                f"a prompt of {num_tokens} tokens cannot be made: what stands around its text has {overhead} already; "
                f"make it longer"
            )
        for _ in range(_NUM_STARTS):
            if (start := next(self._starts, None)) is None:
                raise BenchmarkError(
                    "the text has too few words for that many different prompts; lower --num-prompts or "
                    "use --dataset-name random-ids"
                )
            text, end = self._guess(start, num_tokens - overhead)
            for _ in range(_NUM_WALKS):
                framed = frame(text[:end])
                missing = num_tokens - self.count(framed)
                if missing == 0:
                    return framed
                end += missing
                if not 0 < end <= len(text):
                    break
        raise BenchmarkError(
            f"no text of exactly {num_tokens} tokens was found for this tokenizer; use --dataset-name random-ids"
        )

    def count(self, text: str) -> int:
        return len(self._tokenizer.encode(text))

    def _guess(self, start: int, num_tokens: int) -> tuple[str, int]:
        """Return more text than needed, and where its first `num_tokens` tokens end."""
        size = 6 * num_tokens + 64  # characters; English has 4 to 5 a token, small vocabularies 2
        while True:
            repeats = (start + size) // len(self._text) + 1
            text = (self._text * repeats if repeats > 1 else self._text)[start : start + size]
            offsets = self._tokenizer.backend.encode(text, add_special_tokens=False).offsets
            if len(offsets) > num_tokens:
                return text, offsets[num_tokens - 1][1]
            size *= 2


def _text_of(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        text = file.read(_MOST_TEXT)
    if not text.strip():
        raise BenchmarkError(f"--dataset-path is {path}, which holds no text")
    return text


def lines_of(path: str | Path) -> Iterator[tuple[str, str]]:
    """Yield (file and line number for messages, text) of each line that is not empty."""
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path} line {number}", line


class IdSource:
    """Drawn token ids that stand for text: none of a tokenizer's added tokens, such as BOS or those of chat templates.

    Without a tokenizer both ends of the vocabulary are left out, where such ids lie.
    """

    def __init__(self, vocab_size: int | None, tokenizer: Tokenizer | None, rng: np.random.Generator):
        self._rng = rng
        if tokenizer is not None:
            added = tokenizer.backend.get_added_tokens_decoder()
            size = min(vocab_size or tokenizer.vocab_size, tokenizer.vocab_size)
            self._ids = [i for i in range(size) if i not in added]
        elif vocab_size is not None:
            edge = -(-vocab_size // _SPREAD)
            self._ids = list(range(edge, vocab_size - edge))
        else:
            raise BenchmarkError("token ids are drawn from a vocabulary whose size is not known; give --tokenizer")

    def ids(self, num_tokens: int, rng: np.random.Generator | None = None) -> list[int]:
        table = self._ids  # its int objects are shared: a trace has millions of tokens
        return [table[i] for i in (rng or self._rng).integers(0, len(table), num_tokens).tolist()]
