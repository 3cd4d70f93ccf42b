"""`python -m sgl_jax.compile --topology v6e-4 --model-path …`: says whether a launch fits, what it costs and whether it
compiles; see docs/features/compile.md."""

import sys
from collections.abc import Sequence

from sgl_jax.observability import log
from sgl_jax.settings.flag_parser import FlagError, Parser
from sgl_jax.settings.server_args import ServerArgs

BAD_USE, INTERRUPTED = 2, 130  # exit codes

_DESCRIPTION = """Says what a launch needs and costs on accelerators that need not be here, and compiles its programs.
Takes every flag of the server as well: python -m sgl_jax.launch_server --help."""


def main(argv: Sequence[str] | None = None, prog: str = "python -m sgl_jax.compile") -> int:
    """Returns the exit code: 0 when the launch fits and, unless --plan, every program compiled."""
    try:
        own, rest = _parser(prog).parse_known_args(argv)
        if own.context < 1:
            raise FlagError("--context", f"--context is {own.context}; it must be at least 1")
        args = ServerArgs.from_cli(rest)
        if args.compile_only:
            raise FlagError(
                "--compile-only",
                "--compile-only is a flag of sgl_jax.launch_server alone; this command compiles unless --plan is given",
            )
        log.setup(args.log_level)
        from sgl_jax.planning.compile_command import compile_for

        return compile_for(args, own.topology, own.context, only_plan=own.plan, json_file=own.json)
    except FlagError as error:
        print(f"compile: error: {error}", file=sys.stderr)
        return BAD_USE
    except KeyboardInterrupt:
        return INTERRUPTED


def _parser(prog: str) -> Parser:
    parser = Parser(
        prog=prog,
        usage="%(prog)s --topology NAME --model-path PATH [--plan] [--json FILE] [--context N] [server flags]",
        description=_DESCRIPTION,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--topology",
        metavar="NAME",
        required=True,
        help="v5e-N, v5p-N, v6e-N, v7x-N with N chips; cpu, gpu: this machine's; h100-N, h200-N: with --plan",
    )
    parser.add_argument("--plan", action="store_true", help="only compute, in seconds and without libtpu")
    parser.add_argument("--json", metavar="FILE", help="write everything there; - is standard output, without tables")
    parser.add_argument(
        "--context",
        type=int,
        default=1024,
        metavar="N",
        help="tokens each row has in the cache when steps are counted (default: 1024)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
