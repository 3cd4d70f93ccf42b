"""Threads that compile grammars, for which the end of the process does not wait."""

from __future__ import annotations

import concurrent.futures
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue

from sgl_jax.constrained.grammar import LibraryGrammar, compile_grammar
from sgl_jax.constrained.token_tree import TokenTree
from sgl_jax.request import Grammar

_NUM_THREADS = 2


class Task[T](Future[T]):
    """Work of a thread of a GrammarCompiler, with the time that it takes."""

    def __init__(self, work: Callable[[], T], replace: Callable[[], None]):
        """`replace` starts a thread in the place of one that does not end."""
        super().__init__()
        self.given_up = False
        self._work, self._replace, self._began, self._took = work, replace, 0.0, 0.0

    @property
    def seconds(self) -> float:
        """Seconds since a thread began it, or those that it took; 0 while it is queued."""
        return self._took or (time.perf_counter() - self._began if self._began else 0.0)

    def give_up(self) -> None:
        """Let another thread go on with the queue, since this work cannot be stopped."""
        if not self.given_up:
            self.given_up = True
            self._replace()

    def run(self) -> None:
        self._began = time.perf_counter()
        try:
            found = self._work()
        except BaseException as error:  # a panic of the library is no Exception
            self._took = self.seconds
            self.set_exception(error)
        else:
            self._took = self.seconds
            self.set_result(found)


class GrammarCompiler:
    """Compiles grammars over one vocabulary. One thread owns this; others do the work."""

    def __init__(self, load_vocabulary: Callable[[], TokenTree]):
        """Begin to load the vocabulary."""
        self._queue: SimpleQueue[Task[TokenTree] | Task[LibraryGrammar] | None] = SimpleQueue()
        self._vocabulary = Task(load_vocabulary, self._add_thread)
        self._queue.put(self._vocabulary)
        self._closed = False
        for _ in range(_NUM_THREADS):
            self._add_thread()

    def wait(self) -> None:
        """Wait until the vocabulary is loaded. An error of it is that of every grammar."""
        concurrent.futures.wait([self._vocabulary])

    def compile(self, grammar: Grammar) -> Task[LibraryGrammar]:
        """Queue a grammar. The future's error is a ValueError with the reason why it cannot be compiled."""
        task = Task(lambda: compile_grammar(self._vocabulary.result(), grammar), self._add_thread)
        self._queue.put(task)
        return task

    def close(self) -> None:
        """Let the threads end with what they are at."""
        self._closed = True
        for _ in range(_NUM_THREADS):
            self._queue.put(None)

    def _add_thread(self) -> None:
        threading.Thread(target=self._serve, name="sgl-jax-grammar", daemon=True).start()

    def _serve(self) -> None:
        while (work := self._queue.get()) is not None and not self._closed:
            work.run()
            if work.given_up:
                return
