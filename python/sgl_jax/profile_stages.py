"""Where a profile's time went, by stage: `python -m sgl_jax.profile_stages FOLDER` (docs/features/profiling.md)."""

from __future__ import annotations

import sys
from pathlib import Path

from sgl_jax.tools.benchmark.arguments import new_parser
from sgl_jax.tools.benchmark.terminal import exit_code


def main(argv: list[str] | None = None) -> int:
    return exit_code("profile_stages", lambda: _show(argv))


def _show(argv: list[str] | None) -> int:
    usage = "python -m sgl_jax.profile_stages PROFILE [--perfetto FILE]"
    parser = new_parser(usage, "Where a profile's time went.")
    parser.add_argument("profile", type=Path, help="an .xplane.pb file, or a folder: its newest one")
    parser.add_argument("--perfetto", type=Path, metavar="FILE", help="also write the stages as a trace, a .json.gz")
    args = parser.read(argv)

    from sgl_jax.tools.benchmark.stages import find_profile, read_profile, table, write_perfetto

    try:
        path = find_profile(args.profile)
        profile = read_profile(path)
        print(f"{path}: {len(profile.host['collect'])} steps collected\n")
        print(table(profile))
        if args.perfetto is not None:
            write_perfetto(profile, args.perfetto)
            print(f"\nwrote {args.perfetto}; open it in ui.perfetto.dev")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
