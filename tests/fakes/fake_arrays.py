"""Weights and KV pools of the fake device, which leave it and come back."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future

from fakes.fake_runner import FakeRunner


class FakeArrays:
    """The engine.trainer_calls.DeviceArrays of a test. A path is the number of its weights. One that begins with "bad" cannot be
    read, and one with "odd" as nobody thought. With `waits` weights are read when `finish` is called."""

    def __init__(self, waits: bool = False):
        self.runner: FakeRunner | None = None
        self.released: frozenset[str] = frozenset()
        self._waits, self._next, self._kept = waits, 0, 0
        self._reads: list[tuple[Future[None], str]] = []

    def read(self, path: str, load_format: str) -> Future[None]:
        future: Future[None] = Future()
        self._reads.append((future, path))
        if not self._waits:
            self.finish()
        return future

    def finish(self) -> None:
        future, path = self._reads.pop()
        if path.startswith(("bad", "odd")):
            error = ValueError(f"{path} is bad") if path.startswith("bad") else RuntimeError("odd")
            future.set_exception(error)
        else:
            self._next = int(path)
            future.set_result(None)

    def exchange(self) -> None:
        if "weights" in self.released:
            self._kept = self._next
        else:
            self._device.weights = self._next

    def release(self, tags: Iterable[str]) -> None:
        new = {*tags} - self.released
        if "weights" in new:
            self._kept = self._device.weights
        if "kv_cache" in new:
            self._device.forget()
        self.released |= new
        self._device.is_whole = False

    def resume(self, tags: Iterable[str]) -> None:
        if "weights" in self.released & {*tags}:
            self._device.weights = self._kept
        self.released -= {*tags}
        self._device.is_whole = not self.released

    @property
    def _device(self) -> FakeRunner:
        assert self.runner is not None
        return self.runner
