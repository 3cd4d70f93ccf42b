"""Grammars whose masks are hashes of the text so far, so that a mask of another place or row gives a wrong token."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from fakes.hashing import mix
from sgl_jax.request import Grammar


class FakeMatcher:
    """A third of the tokens may come next; eos, token 0, in some places, and where nothing else may."""

    def __init__(self, text: str, vocab_size: int):
        self._state, self._vocab_size = sum(text.encode()), vocab_size
        self._left = int(text.removeprefix("fails after ")) if text.startswith("fails after ") else 1 << 30

    def advance(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            if token not in self.allowed():
                raise ValueError(f"token {token} is not allowed")
            if self._left == 0:
                raise ValueError("it is too complex")
            self._left -= 1
            self._state = mix(self._state * 3 + token)

    def allowed(self) -> list[int]:
        found = [token for token in range(1, self._vocab_size) if mix(self._state ^ (token << 20)) % 3 == 0]
        return found if found and self._state % 5 else [0, *found]

    def mask(self) -> np.ndarray:
        return packed(self.allowed(), self._vocab_size)


def packed(tokens: Sequence[int], vocab_size: int) -> np.ndarray:
    """Return a mask with the bits of these tokens."""
    bits = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    bits[list(tokens)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


def unpacked(mask: np.ndarray) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())


@dataclasses.dataclass
class FakeGrammar:
    """A future of itself, which is done after some looks."""

    text: str
    vocab_size: int
    looks: int
    seconds: float = 0.0

    def done(self) -> bool:
        self.looks -= 1
        return self.looks < 0

    def exception(self) -> Exception | None:
        return ValueError("it is bad") if self.text == "bad" else None

    def result(self) -> FakeGrammar:
        return self

    def give_up(self) -> None: ...

    def matcher(self) -> FakeMatcher:
        return FakeMatcher(self.text, self.vocab_size)


class FakeGrammars:
    """The engine.grammar_compiles.Compiler of a test. `looks`: how often one must look at a grammar until it is compiled."""

    def __init__(self, vocab_size: int, looks: int = 2):
        self._vocab_size, self._looks = vocab_size, looks
        self.compiled: list[FakeGrammar] = []

    def wait(self) -> None: ...

    def compile(self, grammar: Grammar) -> FakeGrammar:
        self.compiled.append(FakeGrammar(grammar.text, self._vocab_size, self._looks))
        return self.compiled[-1]

    def close(self) -> None: ...
