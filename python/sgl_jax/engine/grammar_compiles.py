"""Grammars on the engine's side: from a command to compile one to the requests that run under it."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Collection
from typing import Protocol

from sgl_jax.constrained.compile_threads import GrammarCompiler
from sgl_jax.constrained.token_tree import TokenTree, token_tree
from sgl_jax.engine.messages import CompileGrammar, Event, Finished, GrammarCompiled, Refused
from sgl_jax.models.decoder_config import DecoderConfig
from sgl_jax.request import FinishReason, Grammar
from sgl_jax.scheduler.grammar_rows import CompiledGrammar
from sgl_jax.scheduler.scheduler import Scheduler
from sgl_jax.settings.server_args import ServerArgs
from sgl_jax.text.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)

COMPILE_SECONDS = 30.0


class Compiling(Protocol):
    """Future of a compiled grammar."""

    @property
    def seconds(self) -> float:
        """Seconds since it began, or those that it took; 0 while it is queued."""
        ...

    def done(self) -> bool: ...

    def exception(self) -> BaseException | None: ...

    def result(self) -> CompiledGrammar: ...

    def give_up(self) -> None:
        """Let others be compiled in its place."""


class Compiler(Protocol):
    """Threads that compile (constrained.compile_threads)."""

    def wait(self) -> None:
        """Wait until grammars can be compiled."""

    def compile(self, grammar: Grammar) -> Compiling: ...

    def close(self) -> None: ...


class Grammars:
    """Compiled grammars by their text, calls that wait for one, and requests whose grammar failed them."""

    def __init__(self, compiler: Compiler, seconds: float = COMPILE_SECONDS, most_kept: int = 128):
        """`seconds`: after which a grammar is refused; `most_kept`: grammars that no request uses."""
        self.num_compiled, self.compile_seconds = 0, 0.0
        self._compiler, self._seconds, self._most_kept = compiler, seconds, most_kept
        self._compiled: OrderedDict[Grammar, CompiledGrammar] = OrderedDict()  # the latest used at the end
        self._compiling: dict[Grammar, Compiling] = {}
        self._calls: list[CompileGrammar] = []

    @property
    def has_work(self) -> bool:
        return bool(self._calls)

    def wait(self) -> None:
        """Wait until grammars can be compiled."""
        self._compiler.wait()

    def compile(self, command: CompileGrammar) -> None:
        """Begin to compile a grammar, unless it is."""
        self._calls.append(command)
        self.find(Grammar(command.kind, command.text))

    def find(self, grammar: Grammar) -> CompiledGrammar | None:
        """Return a grammar that is compiled; otherwise have it compiled, and return None."""
        if (found := self._compiled.get(grammar)) is not None:
            self._compiled.move_to_end(grammar)
        elif grammar not in self._compiling:
            self._compiling[grammar] = self._compiler.compile(grammar)
        return found

    def poll(self, scheduler: Scheduler) -> tuple[list[Event], list[Finished]]:
        """Return answers to the calls that are decided by now, and requests that ended because their grammar failed."""
        failed = scheduler.grammars.failed
        refused = self._take_done() if self._compiling else {}
        if refused:
            waiting = ((key, request.params.grammar) for key, request in scheduler.waiting.items())
            failed |= {key: refused[grammar] for key, grammar in waiting if grammar in refused}
        finished = [
            Finished(key, FinishReason("abort", message=f"the grammar of the request failed: {why}"))
            for key, why in failed.items()
            if scheduler.abort(key)
        ]
        failed.clear()
        events = self._answers(refused) if self._calls else []
        if len(self._compiled) > self._most_kept:
            self._forget({request.params.grammar for request in scheduler.requests.values()})
        return events, finished

    def close(self) -> None:
        self._compiler.close()

    def _take_done(self) -> dict[Grammar, str]:
        """Keep what is compiled by now, and return why others cannot be. One that takes too long is refused until it is done."""
        refused = {}
        for grammar, each in [*self._compiling.items()]:
            if each.done():
                del self._compiling[grammar]
                self.num_compiled, self.compile_seconds = self.num_compiled + 1, self.compile_seconds + each.seconds
                if (error := each.exception()) is None:
                    self._compiled[grammar] = each.result()
                    continue
                refused[grammar] = str(error) or "it could not be compiled"
                if not isinstance(error, ValueError):
                    logger.error("a grammar could not be compiled", exc_info=error)
            elif each.seconds >= self._seconds:
                each.give_up()
                said = f"it is not compiled after {self._seconds:g} seconds, which is the limit; make it simpler"
                refused[grammar] = said
        return refused

    def _forget(self, used: Collection[Grammar | None]) -> None:
        unused = [grammar for grammar in self._compiled if grammar not in used]
        for grammar in unused[: max(0, len(unused) - self._most_kept)]:
            del self._compiled[grammar]

    def _answers(self, refused: dict[Grammar, str]) -> list[Event]:
        calls, self._calls, events = self._calls, [], list[Event]()
        for command in calls:
            grammar = Grammar(command.kind, command.text)
            if grammar in refused:
                events.append(Refused(command.call, refused[grammar], command.kind))
            elif grammar in self._compiled:
                events.append(GrammarCompiled(command.call))
            else:
                self._calls.append(command)
        return events


def grammars_of(args: ServerArgs, model: DecoderConfig) -> Grammars | None:
    """Begin to make a launch ready for grammars, in a thread that reads the tokenizer; None in a launch that takes none."""
    if args.grammar_backend == "none" or model.pooling is not None:
        return None

    def load() -> TokenTree:
        tokenizer = load_tokenizer(args.tokenizer_path or args.model_path, args.chat_template, args.downloads)
        return token_tree(tokenizer, model.vocab_size, model.eos_token_ids)

    return Grammars(GrammarCompiler(load))
