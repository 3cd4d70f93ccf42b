"""Grammars by their text: compiled in threads, and kept while they are used."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from sgl_jax.constrained.grammar import LibraryGrammar, compile_grammar
from sgl_jax.constrained.token_tree import TokenTree
from sgl_jax.request import Grammar

_NUM_THREADS = 2
_MOST_KEPT = 128


class GrammarCache:
    """Compiles grammars. One thread owns this; others do the work."""

    def __init__(self, load_vocabulary: Callable[[], TokenTree]):
        """Begin to load the vocabulary in a thread; the first grammar waits for it."""
        self._pool = ThreadPoolExecutor(_NUM_THREADS, "sgl-jax-grammar")
        self._vocabulary = self._pool.submit(load_vocabulary)
        self._compiled: OrderedDict[Grammar, Future[LibraryGrammar]] = OrderedDict()

    def compiled(self, grammar: Grammar) -> Future[LibraryGrammar]:
        """Return a grammar that is compiled or being compiled; begin to compile it if it is new. The future's error is a
        ValueError with the reason why it cannot be."""
        future = self._compiled.get(grammar)
        if future is None or future.cancelled():
            future = self._compiled[grammar] = self._pool.submit(self._compile, grammar)
            done = (each for each, other in self._compiled.items() if other.done())
            for old in [*itertools.islice(done, max(0, len(self._compiled) - _MOST_KEPT))]:
                del self._compiled[old]
        self._compiled.move_to_end(grammar)
        return future

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _compile(self, grammar: Grammar) -> LibraryGrammar:
        return compile_grammar(self._vocabulary.result(), grammar)
