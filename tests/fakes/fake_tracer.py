"""Fake tracer that records calls and writes no files."""

import contextlib
import errno
import os
import threading
from collections.abc import Iterator

UNWRITABLE = "/unwritable"  # a folder that nothing can be written to
FULL = "/full"  # a folder whose disk is full when the profile ends
DEFAULT = "/tmp/fake-profile"


class FakeTracer:
    """The engine.profiling.Tracer of tests. `spans` has the names entered while it recorded, for a step "step 7"."""

    def __init__(self) -> None:
        self.spans: list[str] = []
        self.options: tuple[int | None, int | None] | None = None
        self.num_stopped = self.grown = 0
        self.may_write = threading.Event()  # cleared: writing takes until it is set
        self.may_write.set()
        self._folder: str | None = None

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        if self._folder is not None:
            self.spans.append(name)
        yield

    def step(self, number: int) -> contextlib.AbstractContextManager[None]:
        return self.stage(f"step {number}")

    def start(self, folder: str | None, host_level: int | None, python_level: int | None) -> str:
        if folder == UNWRITABLE:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), folder)
        if self._folder is not None:
            raise RuntimeError("another profile runs")
        self._folder = folder or DEFAULT
        self.options = host_level, python_level
        return self._folder

    def num_bytes(self) -> int:
        return self.grown

    def stop(self) -> list[str]:
        folder, self._folder = self._folder, None
        self.num_stopped += 1
        assert self.may_write.wait(60)
        if folder == FULL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return [f"{folder}/fake.xplane.pb"]
