"""`python -m sgl_jax.bench_serving`: a load on a server, measured; `… sweep`: a grid of them."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from sgl_jax.tools.benchmark.arguments import parse_serving
from sgl_jax.tools.benchmark.terminal import exit_code


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 when a request failed, 2 for a mistake in the use, 130 when interrupted."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["sweep"]:
        from sgl_jax.tools.benchmark.sweep import main as sweep

        return sweep(list(argv[1:]))

    def run() -> int:
        args = parse_serving(argv)
        from sgl_jax.tools.benchmark.serving import serve_load

        return serve_load(args)

    return exit_code("bench_serving", run)


if __name__ == "__main__":
    sys.exit(main())
