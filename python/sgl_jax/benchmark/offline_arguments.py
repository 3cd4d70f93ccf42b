"""The flags of bench_offline_throughput, on top of the server's. Imports nothing heavy, so that `--help` is instant."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from sgl_jax.benchmark import datasets
from sgl_jax.benchmark.engine_flags import read_flags
from sgl_jax.benchmark.errors import BenchmarkError
from sgl_jax.server_args import ServerArgs


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, ServerArgs]:
    """Raises BenchmarkError for the first flag that cannot be honoured."""
    args, server_args = read_flags(_parser(), argv)
    args.extra_request_body = _sampling_fields(args.extra_request_body)
    if args.profile_output_dir is not None and not args.profile:
        raise BenchmarkError("--profile-output-dir needs --profile")
    args.profile_output_dir = args.profile_output_dir or "profile_offline"
    return args, server_args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="python -m sgl_jax.bench_offline_throughput --model-path PATH [flags]",
        description="Measures how fast an engine in this process works off a data set, all of it given at once. Every "
        "flag of the server is taken as well (python -m sgl_jax.launch_server --help).",
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34),
    )
    datasets.add_arguments(parser)
    group = parser.add_argument_group("Run")
    add = group.add_argument
    add("--backend", choices=("engine",), default="engine", help="sgl_jax.Engine, the only one (default: engine)")
    add("--seed", type=int, default=1, metavar="N", help="of what the data set draws (default: 1)")
    add("--disable-ignore-eos", action="store_true", help="let answers end where the model ends them")
    add(
        "--extra-request-body",
        metavar="JSON",
        help="sampling parameters of every request, as in /generate: '{\"temperature\": 0.8}' (default: greedy)",
    )
    add("--skip-warmup", action="store_true", help="measure from the first request on")
    add("--profile", action="store_true", help="then run the first prompts once more in a trace of the JAX profiler")
    add("--profile-output-dir", metavar="PATH", help="where the trace goes (default: profile_offline)")
    add("--result-filename", default="", metavar="FILE", help="one JSON object is appended (default: none)")
    return parser


def _sampling_fields(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise BenchmarkError(f"--extra-request-body is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise BenchmarkError(f"--extra-request-body is {text}; it must be a JSON object")
    if fields.get("n", 1) != 1:
        raise BenchmarkError(f"--extra-request-body has n {fields['n']}; one answer to a prompt is measured")
    return fields
