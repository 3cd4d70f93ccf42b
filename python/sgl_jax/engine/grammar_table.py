"""Grammars on the API side: before requests are sent, the engine compiles their grammars or refuses them."""

import asyncio
from collections import OrderedDict
from collections.abc import Iterable

from sgl_jax.engine.adapter_table import Ask
from sgl_jax.engine.generation import GenerationRequest
from sgl_jax.engine.messages import CompileGrammar
from sgl_jax.request import Grammar, InvalidParameter

_MOST_KNOWN = 128


class GrammarTable:
    """Grammars that the engine is known to have compiled. It compiles one that it has forgotten since when a request needs
    it. Calls with one grammar share a message."""

    def __init__(self, ask: Ask):
        self._ask = ask
        self._known: OrderedDict[Grammar, None] = OrderedDict()
        self._compiling: dict[Grammar, asyncio.Task[None]] = {}

    @property
    def num_calls(self) -> int:
        """Number of grammars that wait for the engine, which may take longer than any step."""
        return len(self._compiling)

    async def prepare(self, requests: Iterable[GenerationRequest], enabled: bool) -> None:
        """Wait until the requests' grammars are compiled. Raises InvalidParameter for one that cannot be, and for all without
        `enabled`: the launch takes none."""
        for request in requests:
            if (grammar := request.params.grammar) is None:
                continue
            if not enabled:
                said = f"{{{grammar.kind}}}: this launch takes no grammars; --grammar-backend {{backend}} makes it take them"
                raise InvalidParameter(grammar.kind, said, backend="llguidance").named(request.names)
            if grammar in self._known:
                self._known.move_to_end(grammar)
                continue
            try:
                await asyncio.shield(self._compiling.get(grammar) or self._compile(grammar))
            except InvalidParameter as error:
                said = f"{{{grammar.kind}}}: {{why}}"
                raise InvalidParameter(grammar.kind, said, why=str(error)).named(request.names) from error

    def _compile(self, grammar: Grammar) -> asyncio.Task[None]:
        async def compile_it() -> None:
            try:
                await self._ask(lambda call: CompileGrammar(call, grammar.kind, grammar.text), int)
            finally:
                del self._compiling[grammar]
            self._known[grammar] = None
            if len(self._known) > _MOST_KNOWN:
                self._known.popitem(last=False)

        self._compiling[grammar] = task = asyncio.create_task(compile_it())
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may wait for its error
        return task
