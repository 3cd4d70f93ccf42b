"""Tries one platform of jax: `python probe.py tpu`. Run as a file, in a process of its own (see probing.py).

Writes JSON objects, one a line: {"stage": …} when a stage begins, and in the end what it found or {"error": …}. They go
to the standard output it was started with; all else that is printed, by libraries too, goes to the standard error.
"""

import contextlib
import json
import logging
import os
import sys
from typing import Any

_SIDE = 128  # rows and columns of the matrix: one tile of any accelerator


def main(platform: str) -> None:
    """Import jax, initialise the platform and multiply two matrices on it, and write a line for each stage."""
    out = os.dup(1)
    os.dup2(2, 1)

    def tell(**found: Any) -> None:
        os.write(out, (json.dumps(found) + "\n").encode())

    logging.getLogger().addHandler(log := _Log())
    try:
        tell(stage="importing jax")
        import jax

        # Programs compiled here are of no use to anybody.
        jax.config.update("jax_enable_compilation_cache", False)
        tell(stage="initialising", jax_version=jax.__version__)
        devices = [device.device_kind for device in jax.devices(platform)]
        first = jax.local_devices(backend=platform)[0]
        memory = None
        with contextlib.suppress(Exception):  # raised by a platform that does not count
            memory = (first.memory_stats() or {}).get("bytes_limit")
        runtime = str(getattr(first.client, "platform_version", ""))
        process_count = jax.process_count()
        tell(stage="computing", runtime=runtime, devices=devices, memory=memory, process_count=process_count)
        _compute(jax, first)
        tell(ok=True, log=log.lines)
    except BaseException as error:
        tell(error=f"{type(error).__name__}: {error}".rstrip(": "), log=log.lines)


class _Log(logging.Handler):
    """Keeps warnings and errors: when jax cannot use a plugin it logs why, and then fails with something else."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        cause = record.exc_info[1] if record.exc_info else None
        self.lines.append(record.getMessage() + (f" ({type(cause).__name__}: {cause})" if cause else ""))


def _compute(jax: Any, device: Any) -> None:
    """Multiply two matrices: a driver or runtime that does not fit shows here at the latest."""
    import numpy as np

    ones = jax.device_put(np.ones((_SIDE, _SIDE), np.float32), device)
    product = np.asarray(jax.jit(lambda x: x @ x)(ones))
    if not (product == _SIDE).all():
        raise ArithmeticError(f"ones times ones, {_SIDE} wide, gave values from {product.min()} to {product.max()}")


if __name__ == "__main__":
    main(sys.argv[1])
