"""Calls of the engine: a command is sent with a number, and its answer comes back with the same number."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

from sgl_jax.engine.messages import Command, ProfileStatus

type Answer = int | ProfileStatus


class Calls:
    """Calls that wait for their answer."""

    def __init__(self, check_ready: Callable[[], None], send: Callable[[Command], None]):
        self._check_ready, self._send = check_ready, send
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Answer]] = {}

    async def ask[T: Answer](self, command: Callable[[int], Command], answer: type[T]) -> T:
        """Send the command made for a new call and wait for its answer. Raises Conflict or InvalidParameter for a refusal."""
        self._check_ready()
        call = next(self._numbers)
        self._send(command(call))  # before the call is kept, since a command may be impossible to encode
        self._waiting[call] = future = asyncio.get_running_loop().create_future()
        found = await future
        assert isinstance(found, answer)
        return found

    def answer(self, call: int, answer: Answer | Exception) -> None:
        """Hand the answer to its caller, if it still waits."""
        future = self._waiting.pop(call, None)
        if future is None or future.done():
            return
        if isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result(answer)

    def fail(self, error: Exception) -> None:
        """End every call with the error."""
        for call in list(self._waiting):
            self.answer(call, error)
