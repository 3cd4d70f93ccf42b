"""Grammars of running requests: each row's place in its grammar, and the mask of the tokens that may come next.

The mask of a row depends on its last token, which the host must know before the row can run again. So such a row sits out
the step after one that samples for it; the other rows go on. A mask is computed when the next step is planned, when the tokens
are on their way to the client, and reaches the device with the plan of the row's next step.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np

from sgl_jax.request import Grammar, Request
from sgl_jax.scheduler.rows import RowTable
from sgl_jax.step_plan import Param, RowFlag, RowLoad


class Matcher(Protocol):
    def advance(self, tokens: Sequence[int]) -> None:
        """Move over the tokens. Raises ValueError if the grammar does not allow them, or has become too complex."""

    def mask(self) -> np.ndarray:
        """Return a bit for each token of the vocabulary, i32: whether it may come next. Raises ValueError."""
        ...


class CompiledGrammar(Protocol):
    def matcher(self) -> Matcher:
        """Return a matcher at the start of a text."""
        ...


@dataclasses.dataclass(slots=True)
class _Place:
    request: Request
    matcher: Matcher
    num_taken: int  # tokens of the row, prompt included, that the matcher has moved over
    mask: np.ndarray  # as the device has it, or will with the row's next step
    has_waited: bool = False  # for other rows, since its last token


class GrammarRows:
    def __init__(self, table: RowTable, find: Callable[[Grammar], CompiledGrammar | None]):
        """`find` returns a compiled grammar; otherwise it begins to compile it and returns None."""
        self._table, self._find = table, find
        self._places: dict[int, _Place] = {}  # by row
        self._unsent: set[int] = set()  # rows whose mask the device does not have
        self.failed: dict[int, str] = {}  # by key: why a request cannot go on
        self.num_masks, self.mask_seconds = 0, 0.0  # computed so far

    def admits(self, request: Request) -> bool:
        """Return whether the request's grammar is compiled."""
        grammar = request.params.grammar
        return grammar is None or self._find(grammar) is not None

    def seat(self, request: Request) -> None:
        """Find the place of a request that `admits` has let pass, and that has its row: behind its output so far."""
        if (grammar := request.params.grammar) is None:
            return
        compiled = self._find(grammar)
        assert compiled is not None
        nothing = np.empty(0, np.int32)
        place = self._places[request.row] = _Place(request, compiled.matcher(), len(request.prompt), nothing)
        self._move(request.row, place)
        self._unsent.add(request.row)

    def leave(self, row: int) -> None:
        """Forget a row that is given up."""
        self._places.pop(row, None)
        self._unsent.discard(row)

    def ready(self, rows: np.ndarray, decodes: np.ndarray) -> np.ndarray:
        """Return those of these decoding rows that can run now: with grammars only rows without a token in flight. If there
        is nothing else to run, they wait for each other, so that one step runs them all, but no row waits twice for a token.
        `decodes`: of all running rows; one that does not decode runs in any case."""
        if not self._places:
            return rows
        self._catch_up()
        t = self._table
        if self.failed:
            rows = rows[~np.isin(t.key[rows], [*self.failed])]
        bound = t.params[rows, Param.FLAGS] & RowFlag.GRAMMAR != 0
        waits = bound & (t.num_sure[rows] > t.num_known[rows])
        if waits.any() and bound.all() and decodes.all():
            held = [self._places[row] for row in rows[~waits].tolist()]
            if not any(place.has_waited for place in held):
                for place in held:
                    place.has_waited = True
                return rows[:0]
        return rows[~waits]

    def take_loads(self) -> list[RowLoad]:
        """Return the masks that the device does not have."""
        if not self._unsent:
            return []
        loads = [RowLoad(row, None, None, self._places[row].mask) for row in sorted(self._unsent)]
        self._unsent.clear()
        return loads

    def check_invariants(self, running: Iterable[Request]) -> None:
        """Raise AssertionError unless exactly the running requests with a grammar have a place."""
        bound = {request.row: request for request in running if request.params.grammar is not None}
        assert bound == {row: place.request for row, place in self._places.items()}

    def _catch_up(self) -> None:
        """Move over the tokens that have come."""
        for row, place in self._places.items():
            if self._table.num_known[row] == place.num_taken:
                continue
            before, place.has_waited = place.mask, False
            self._move(row, place)
            if not np.array_equal(before, place.mask):
                self._unsent.add(row)

    def _move(self, row: int, place: _Place) -> None:
        known, began = int(self._table.num_known[row]), time.perf_counter()
        tokens = self._table.tokens[row, place.num_taken : known].tolist()
        place.num_taken = known
        try:
            place.matcher.advance(tokens)
            place.mask = place.matcher.mask()
        except ValueError as error:
            self.failed[place.request.key] = str(error)
        self.num_masks += 1
        self.mask_seconds += time.perf_counter() - began
