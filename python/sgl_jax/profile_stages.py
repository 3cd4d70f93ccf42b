"""`python -m sgl_jax.profile_stages`: where a profile's time went, by stage (docs/features/profiling.md)."""

import sys
from collections.abc import Sequence

from sgl_jax.tools.benchmark.door import run_tool


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 when there is no profile, 2 for a mistake in the use."""
    return run_tool("profile_stages", "stages", argv)


if __name__ == "__main__":
    sys.exit(main())
