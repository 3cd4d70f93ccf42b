"""Sources of prompts of a wanted length: a text, cut to an exact number of tokens, or drawn token ids."""

import functools
import itertools
import re
from importlib import resources

import numpy as np

from sgl_jax.text.tokenizer import Tokenizer
from sgl_jax.tools.benchmark.terminal import BenchmarkError

_NUM_WALKS = 24  # cuts tried from one beginning before another is taken
_NUM_STARTS = 50  # beginnings tried for one prompt
_MOST_TEXT = 2**22  # characters read of a file of the user's
_SPREAD = 64  # without a tokenizer the outer 1/64 of the vocabulary at either end is left out


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
        if path:
            with open(path, encoding="utf-8") as file:
                self._text = file.read(_MOST_TEXT)
        else:
            self._text = bundled_text()
        words = [match.start() for match in re.finditer(r"\S+", self._text)]
        if not words:
            raise BenchmarkError(f"--dataset-path is {path}, which holds no text")
        self._starts = iter(rng.permutation(words).tolist())

    def piece(self, num_tokens: int, before: str = "") -> str:
        """Return `before` and a piece of the text, together of exactly `num_tokens` tokens. At the text's end it begins again.

        Raises BenchmarkError when `before` is too long itself, and when no such piece is left.
        """
        overhead = self._count(before)
        if num_tokens <= overhead:
            raise BenchmarkError(
                f"a prompt of {num_tokens} tokens cannot be made: what stands around its text has {overhead} already; "
                f"make it longer"
            )
        for start in itertools.islice(self._starts, _NUM_STARTS):
            text, end = self._guess(start, num_tokens - overhead)
            for _ in range(_NUM_WALKS):
                missing = num_tokens - self._count(before + text[:end])
                if missing == 0:
                    return before + text[:end]
                end += missing
                if not 0 < end <= len(text):
                    break
        raise BenchmarkError(
            f"the text has no other piece of exactly {num_tokens} tokens for this tokenizer; lower --num-prompts or "
            "use --dataset-name random-ids"
        )

    def _count(self, text: str) -> int:
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
