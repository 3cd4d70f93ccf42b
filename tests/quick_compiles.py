"""Programs compiled without LLVM's optimisations, which take half of the time on a CPU. Comparisons with a reference do not
need them; tests of servers, of equal bits and of the default model compile as a launch does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

XLA_FLAG = "--xla_backend_optimization_level=0"  # for processes of their own


@contextlib.contextmanager
def quick_compiles() -> Iterator[None]:
    """Compile so what this process compiles for a CPU meanwhile."""
    from sgl_jax.runtime import compiler

    name, _, value = XLA_FLAG.removeprefix("--").partition("=")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(compiler.COMPILER_OPTIONS, "cpu", {name: value})
        yield
