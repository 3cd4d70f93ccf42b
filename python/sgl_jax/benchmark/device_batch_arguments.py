"""The flags of bench_one_batch, on top of the server's. Imports nothing heavy, so that `--help` is instant."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from sgl_jax.benchmark.engine_flags import read_flags
from sgl_jax.benchmark.errors import BenchmarkError
from sgl_jax.server_args import ServerArgs


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, ServerArgs]:
    """Raises BenchmarkError for the first flag that cannot be honoured."""
    args, server_args = read_flags(_parser(), argv)
    _check(args)
    args.batch_size = args.batch_size or [1]
    args.input_len = args.input_len or [1024]
    args.output_len = args.output_len or [16]
    args.profile_filename_prefix = args.profile_filename_prefix or "profile"
    return args, server_args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="python -m sgl_jax.bench_one_batch --model-path PATH [flags]",
        description="Measures single batches on the device: a prefill and decode steps, with no server and no "
        "scheduler. Every flag of the server is taken as well (python -m sgl_jax.launch_server --help).",
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34),
    )
    add = parser.add_argument
    add("--run-name", default="default", metavar="NAME", help="a name for the results (default: default)")
    add("--batch-size", type=int, nargs="+", metavar="N", help="requests in a batch (default: 1)")
    add("--input-len", type=int, nargs="+", metavar="N", help="tokens of a prompt (default: 1024)")
    add(
        "--output-len",
        type=int,
        nargs="+",
        metavar="N",
        help="tokens to generate, the prefill's own included (default: 16)",
    )
    add("--seed", type=int, default=1, metavar="N", help="of the prompts' random token ids (default: 1)")
    add(
        "--prompt-filename",
        metavar="FILE",
        help="a prompt a line: for --correctness-test; without it, the text that prompts of --input-len are cut from "
        "(default: three sentences; random token ids)",
    )
    add(
        "--result-filename",
        default="result.jsonl",
        metavar="FILE",
        help="one JSON object per batch is appended; '' for none (default: result.jsonl)",
    )
    add(
        "--correctness-test",
        "--correct",
        action="store_true",
        help="time nothing: generate for real prompts, and print ids and text",
    )
    add(
        "--cut-len",
        type=int,
        metavar="N",
        help="with --correctness-test: prefill N tokens of each prompt first and the rest then (default: all at once)",
    )
    add(
        "--log-decode-step",
        type=int,
        default=0,
        metavar="N",
        help="print every Nth decode step, not only the first five (default: 0, no more)",
    )
    add("--profile", action="store_true", help="then run each batch once more in a trace of the JAX profiler")
    add(
        "--profile-filename-prefix",
        metavar="PATH",
        help="a batch's trace goes to the folder PATH_batchB_inputI_outputO (default: profile)",
    )
    return parser


def _check(args: argparse.Namespace) -> None:
    for name in ("batch_size", "input_len", "output_len"):
        values = getattr(args, name)
        if values is not None and min(values) < 1:
            raise BenchmarkError(f"--{name.replace('_', '-')} is {min(values)}; it must be at least 1")
    if args.correctness_test:
        for name in ("batch_size", "input_len", "profile"):
            if getattr(args, name):
                raise BenchmarkError(f"--{name.replace('_', '-')} is for timed batches, --correctness-test has none")
        if args.output_len and len(args.output_len) > 1:
            raise BenchmarkError("--output-len takes one number beside --correctness-test")
    if args.profile_filename_prefix is not None and not args.profile:
        raise BenchmarkError("--profile-filename-prefix needs --profile")
    if args.log_decode_step < 0:
        raise BenchmarkError(f"--log-decode-step is {args.log_decode_step}; it must be 0 or more")
    if args.cut_len is not None and (args.cut_len < 1 or not args.correctness_test):
        raise BenchmarkError(f"--cut-len is {args.cut_len}; it must be at least 1, beside --correctness-test")
