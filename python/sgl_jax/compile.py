"""`python -m sgl_jax.compile --topology v6e-4 --model-path …`: does it fit, what will it cost, does it compile; see
docs/features/compile.md."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import rich.console

from sgl_jax.observability import log
from sgl_jax.server_args import ServerArgs, ServerArgsError

DOES_NOT_FIT, BAD_USE, INTERRUPTED = 1, 2, 130  # exit codes

_DESCRIPTION = """Says what a launch needs and costs on accelerators that need not be here, and compiles its programs.
Takes every flag of the server as well: python -m sgl_jax.launch_server --help."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ServerArgsError("", message)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 when the launch fits and, unless --plan, every program compiled."""
    try:
        own, rest = _parser().parse_known_args(argv)
        if own.context < 1:
            raise ServerArgsError("--context", f"--context is {own.context}; it must be at least 1")
        return _run(own, ServerArgs.from_cli(rest))
    except ServerArgsError as error:
        print(f"compile: error: {error}", file=sys.stderr)
        return BAD_USE
    except KeyboardInterrupt:
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m sgl_jax.compile",
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


def _run(own: argparse.Namespace, args: ServerArgs) -> int:
    log.setup(args.log_level)
    import jax

    from sgl_jax.planning import report
    from sgl_jax.planning.here import report_program
    from sgl_jax.planning.model import find_model
    from sgl_jax.planning.plan import Misfit, make_plan
    from sgl_jax.planning.programs import DoesNotCompile, compile_launch
    from sgl_jax.planning.target import find_target
    from sgl_jax.runtime.compiler import use_compile_cache
    from sgl_jax.runtime.platform import kernels_for
    from sgl_jax.runtime.topology import set_tpu_environment

    if own.topology not in ("cpu", "gpu"):  # nothing of this machine's is used, or taken from who runs on it
        set_tpu_environment()
        jax.config.update("jax_platforms", "cpu")
    console = rich.console.Console(width=None if sys.stdout.isatty() else 120, quiet=own.json == "-")
    try:
        target = find_target(own.topology, args.tp_size, args.dp_size)
        model = find_model(args.model_path, args.downloads, args.model_package)
        plan = make_plan(args, model, target, own.context)
        kernels = kernels_for(args.attention_backend, target.platform, model.config)
        if not own.plan:
            target.find_devices()  # what cannot be compiled for is said before the tables
    except Misfit as error:
        print(f"compile: it does not fit: {error}", file=sys.stderr)
        return DOES_NOT_FIT
    except ValueError as error:  # of the user's making: a flag, a model, a topology
        print(f"compile: error: {error}", file=sys.stderr)
        return BAD_USE
    console.print(report.fit_table(plan), report.step_table(plan))
    facts, seconds, surplus = None, None, None
    if not own.plan:
        if target.is_here:
            use_compile_cache(args.compilation_cache_dir)
        started = time.perf_counter()
        try:
            facts = compile_launch(model.config, plan.launch, target, kernels, report_program)
        except DoesNotCompile as error:
            print(f"compile: it does not compile: {error}", file=sys.stderr)
            return DOES_NOT_FIT
        except ValueError as error:  # what an attention backend cannot do shows only now
            print(f"compile: error: {error}", file=sys.stderr)
            return BAD_USE
        seconds = time.perf_counter() - started
        console.print(report.program_table(facts))
        console.print(f"Compiled {len(facts)} programs in {seconds:.0f} s.")
        if surplus := report.overflow(plan, facts):
            print(f"compile: it does not fit: {surplus}", file=sys.stderr)
    if own.json:
        text = json.dumps(report.as_data(plan, facts, seconds), indent=2) + "\n"
        if own.json == "-":
            sys.stdout.write(text)
        else:
            Path(own.json).write_text(text, encoding="utf-8")
    return DOES_NOT_FIT if surplus else 0


if __name__ == "__main__":
    sys.exit(main())
