"""Grammars on the engine's side: from a command to compile one to the requests that run under it."""

from __future__ import annotations

import logging
import time
from typing import Protocol

from sgl_jax.constrained.grammar_cache import GrammarCache
from sgl_jax.constrained.token_tree import TokenTree, token_tree
from sgl_jax.engine.messages import CompileGrammar, Event, Finished, GrammarCompiled, Refused
from sgl_jax.models.decoder_config import DecoderConfig
from sgl_jax.request import FinishReason, Grammar
from sgl_jax.scheduler.grammar_rows import CompiledGrammar
from sgl_jax.scheduler.scheduler import Scheduler
from sgl_jax.settings.server_args import ServerArgs
from sgl_jax.text.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)

COMPILE_SECONDS = 30.0  # after which a grammar is refused


class Compiling(Protocol):
    """The future of a compiled grammar."""

    def done(self) -> bool: ...

    def cancel(self) -> bool: ...

    def cancelled(self) -> bool: ...

    def exception(self) -> BaseException | None: ...

    def result(self) -> CompiledGrammar: ...


class Compiler(Protocol):
    """Grammars by their text (constrained.grammar_cache)."""

    def compiled(self, grammar: Grammar) -> Compiling:
        """Return a grammar that is compiled or being compiled; begin to compile it if it is new."""
        ...

    def close(self) -> None: ...


class Grammars:
    """Calls that wait for a grammar, and requests whose grammar failed them."""

    def __init__(self, compiler: Compiler, seconds: float = COMPILE_SECONDS):
        self._compiler, self._seconds = compiler, seconds
        self._calls: list[tuple[CompileGrammar, Compiling, float]] = []  # with the time of the refusal
        self._broken: dict[Grammar, str] = {}  # why a grammar that a request waits for cannot be compiled

    @property
    def has_work(self) -> bool:
        return bool(self._calls or self._broken)

    def compile(self, command: CompileGrammar) -> None:
        """Begin to compile a grammar, unless it is."""
        future = self._compiler.compiled(Grammar(command.kind, command.text))
        self._calls.append((command, future, time.monotonic() + self._seconds))

    def find(self, grammar: Grammar) -> CompiledGrammar | None:
        """Return a grammar that is compiled; otherwise have it compiled again, and return None."""
        future = self._compiler.compiled(grammar)
        if not future.done():
            return None
        if (error := future.exception()) is not None:
            self._broken[grammar] = str(error)
            return None
        return future.result()

    def poll(self, scheduler: Scheduler) -> tuple[list[Event], list[Finished]]:
        """Return answers to the calls that are decided by now, and requests that ended because their grammar failed."""
        failed = scheduler.grammars.failed
        if self._broken:
            waiting = ((key, request.params.grammar) for key, request in scheduler.requests.items())
            failed |= {key: self._broken[grammar] for key, grammar in waiting if grammar in self._broken}
            self._broken.clear()
        finished = [
            Finished(key, FinishReason("abort", message=f"the grammar of the request failed: {why}"))
            for key, why in failed.items()
            if scheduler.abort(key)
        ]
        failed.clear()
        return self._poll_calls() if self._calls else [], finished

    def close(self) -> None:
        self._compiler.close()

    def _poll_calls(self) -> list[Event]:
        calls, self._calls, events = self._calls, [], list[Event]()
        for command, future, until in calls:
            if future.done():
                events.append(_answer(command, future))
            elif time.monotonic() >= until:
                future.cancel()  # it may not have begun
                said = f"it is not compiled after {self._seconds:g} seconds, which is the limit; make it simpler"
                events.append(Refused(command.call, said, command.kind))
            else:
                self._calls.append((command, future, until))
        return events


def grammars_of(args: ServerArgs, model: DecoderConfig) -> Grammars:
    """Begin to make a launch ready for grammars, in a thread that reads the tokenizer."""

    def load() -> TokenTree:
        tokenizer = load_tokenizer(args.tokenizer_path or args.model_path, args.chat_template, args.downloads)
        return token_tree(tokenizer, model.vocab_size, model.eos_token_ids)

    return Grammars(GrammarCache(load))


def _answer(command: CompileGrammar, future: Compiling) -> Event:
    error = None if future.cancelled() else future.exception()
    if error is None and not future.cancelled():
        return GrammarCompiled(command.call)
    if not isinstance(error, ValueError):
        logger.error("a grammar could not be compiled", exc_info=error)
    return Refused(command.call, str(error) or "it could not be compiled", command.kind)
