"""The flags of the tools that run an engine in their own process: the tool's own, and all of the server's.

Imports nothing heavy, so that `--help` is instant.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Collection, Sequence
from typing import Any

from sgl_jax.benchmark import datasets
from sgl_jax.benchmark.arguments import json_object, whole_number
from sgl_jax.benchmark.errors import BenchmarkError
from sgl_jax.benchmark.one_batch_arguments import add_batch_arguments
from sgl_jax.observability import log
from sgl_jax.server_args import FLAGS, SERVER, ServerArgs, ServerArgsError

logger = logging.getLogger(__name__)


def parse_one_batch(argv: Sequence[str] | None) -> tuple[argparse.Namespace, ServerArgs]:
    """Of bench_one_batch. Raises BenchmarkError for a flag of the server that is refused."""
    parser = _parser(
        "bench_one_batch",
        "Measures single batches on the device: a prefill and decode steps, with no server and no scheduler.",
    )
    add_batch_arguments(parser)
    parser.add_argument("--profile", action="store_true", help="then run each batch once more in a trace")
    parser.add_argument(
        "--profile-filename-prefix",
        metavar="PATH",
        help="a batch's trace goes to the folder PATH_batchB_inputI_outputO (default: profile)",
    )
    return _read(parser, argv)


def parse_offline(argv: Sequence[str] | None) -> tuple[argparse.Namespace, ServerArgs]:
    """Of bench_offline_throughput. Raises BenchmarkError for a flag of the server that is refused."""
    parser = _parser(
        "bench_offline_throughput",
        "Measures how fast an engine in this process works off a data set, all of it given at once.",
    )
    datasets.add_arguments(parser)
    add = parser.add_argument_group("Run").add_argument
    add("--backend", choices=("engine",), default="engine", help="sgl_jax.Engine, the only one (default: engine)")
    add("--seed", type=whole_number(0), default=1, metavar="N", help="of what the data set draws (default: 1)")
    add("--disable-ignore-eos", action="store_true", help="let answers end where the model ends them")
    add(
        "--extra-request-body",
        type=json_object,
        default={},
        metavar="JSON",
        help="sampling parameters of every request, as in /generate: '{\"temperature\": 0.8}' (default: greedy)",
    )
    add("--skip-warmup", action="store_true", help="measure from the first request on")
    add("--profile", action="store_true", help="then run the first prompts once more in a trace")
    add("--profile-output-dir", metavar="PATH", help="where the trace goes (default: profile_offline)")
    add("--result-filename", default="", metavar="FILE", help="one JSON object is appended (default: none)")
    return _read(parser, argv)


def _parser(tool: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        usage=f"python -m sgl_jax.{tool} --model-path PATH [flags]",
        description=f"{description} Every flag of the server is taken as well (python -m sgl_jax.launch_server --help).",
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34),
    )


def _read(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> tuple[argparse.Namespace, ServerArgs]:
    """What `parser` does not know must be a flag of the server."""
    args, rest = parser.parse_known_args(argv)
    for flag in ("profile_output_dir", "profile_filename_prefix"):
        if getattr(args, flag, None) is not None and not args.profile:
            raise BenchmarkError(f"--{flag.replace('_', '-')} needs --profile")
    try:
        server_args = ServerArgs.from_cli(rest)
    except ServerArgsError as error:
        raise BenchmarkError(str(error)) from None
    if server_args.compile_only:
        raise BenchmarkError("--compile-only leaves nothing to measure; it is a flag of sgl_jax.launch_server alone")
    return args, server_args


def start_log(server_args: ServerArgs, without_effect: Collection[str] = ()) -> None:
    """The engine's log on standard error, beginning with the flags that change nothing here.

    Those are the HTTP server's, and the fields that `without_effect` names.
    """
    log.setup(server_args.log_level)
    for flag, message in server_args.notices().items():
        log.once(logger, flag, message)
    changed = server_args.changed()
    for each in FLAGS:
        if each.name in changed and (each.about.group == SERVER or each.name in without_effect):
            log.once(logger, each.option, f"{each.option} has no effect: this tool has no part that it is about.")


def engine_options(server_args: ServerArgs) -> dict[str, Any]:
    """What `sgl_jax.Engine` is to be called with: the flags that differ from their defaults, without the HTTP server's."""
    values = {each: getattr(server_args, each.name) for each in FLAGS}
    return {
        each.name: value for each, value in values.items() if not each.is_default(value) and each.about.group != SERVER
    }
