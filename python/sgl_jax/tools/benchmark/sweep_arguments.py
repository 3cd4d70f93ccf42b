"""The flags of `bench_serving sweep`: the grid, bench_serving's own, and the server's where one is started.

Imports nothing heavy, so that `--help` is instant.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sgl_jax.tools.benchmark.arguments import add_serving_arguments, new_parser, real, whole_number
from sgl_jax.tools.benchmark.server_process import START_TIMEOUT_S

MIN_PROMPTS = 4  # of a case, however few requests run at a time
_DESCRIPTION = """Measures a grid of input lengths (ISL), output lengths (OSL) and concurrencies. Run again with the same
flags it skips what is measured already, so a sweep that was stopped goes on."""
_EPILOG = "With --model-path the server's flags are taken as well: python -m sgl_jax.launch_server --help."
# Set by the sweep for each case, or in a way of its own.
_INSTEAD = {
    "max_concurrency": "--concurrency",
    "random_input_len": "--isl",
    "random_output_len": "--osl",
    "output_file": "--output-dir",
    "plot": "--output-dir",
}
_LENGTHS_APPLY = ("random", "random-ids")


@dataclass(frozen=True)
class Case:
    isl: int  # tokens of a prompt
    osl: int  # tokens to generate
    concurrency: int  # requests at a time
    num_prompts: int

    def __str__(self) -> str:
        return f"ISL {self.isl}, OSL {self.osl}, concurrency {self.concurrency}"


def cases(args: argparse.Namespace) -> list[Case]:
    """The grid, in the order of the lists, concurrency changing first."""
    return [
        Case(isl, osl, concurrency, args.num_prompts or max(args.rounds * concurrency, MIN_PROMPTS))
        for isl, osl, concurrency in itertools.product(args.isl, args.osl, args.concurrency)
    ]


def sweep_parser() -> argparse.ArgumentParser:
    usage = "python -m sgl_jax.bench_serving sweep --isl N… --osl N… --concurrency N… --output-dir DIR [flags]"
    parser = new_parser(usage, _DESCRIPTION, _EPILOG)
    add = parser.add_argument_group("Sweep").add_argument
    whole = {"type": whole_number(1), "nargs": "+", "metavar": "N", "required": True}
    add("--isl", **whole, help="tokens of a prompt")
    add("--osl", **whole, help="tokens to generate")
    add("--concurrency", **whole, help="requests at a time")
    add("--output-dir", type=Path, required=True, metavar="DIR", help="for results.jsonl and the pictures")
    text = f"prompts of a case are N x concurrency, at least {MIN_PROMPTS} (default: 3); --num-prompts is for all cases"
    add("--rounds", type=whole_number(1), default=3, metavar="N", help=text)
    add("--model-path", metavar="PATH", help="start a server with this model (default: one runs)")
    text = f"how long the server that is started may take (default: {START_TIMEOUT_S:g})"
    add("--start-timeout", type=real(0), default=START_TIMEOUT_S, metavar="SECONDS", help=text)
    add_serving_arguments(parser)
    for action in parser._actions:
        if action.dest in _INSTEAD:
            action.help = argparse.SUPPRESS
        if action.dest == "random_range_ratio":  # lengths are exact unless asked otherwise: they name the cases
            action.help = "lengths are drawn evenly from X times ISL and OSL to ISL and OSL (default: 1, exact)"
    parser.set_defaults(random_range_ratio=1.0, **dict.fromkeys(_INSTEAD))
    return parser


def parse_sweep(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags, and those of the server to start (none without --model-path). Raises FlagError where they cannot be
    honoured."""
    parser = sweep_parser()
    args, rest = parser.parse_known_args(argv)
    for name, instead in _INSTEAD.items():
        if getattr(args, name) is not None:
            parser.error(f"--{name.replace('_', '-')} is not for a sweep, which has {instead}")
    if args.dataset_name not in _LENGTHS_APPLY:
        choices = " or ".join(_LENGTHS_APPLY)
        parser.error(f"--dataset-name is {args.dataset_name}; a sweep sets lengths, choose {choices}")
    if args.model_path is None:
        if rest:
            parser.error(f"{rest[0]} is not a flag of bench_serving; the server's are taken with --model-path")
        return args, []
    if args.base_url is not None:
        parser.error(f"--model-path starts a server, and --base-url {args.base_url} names one that runs; give one")
    server_flags = ["--model-path", args.model_path, *rest]
    for name in ("host", "port", "served_model_name"):  # both tools have these
        if (value := getattr(args, name)) != parser.get_default(name):
            server_flags += [f"--{name.replace('_', '-')}", str(value)]
    return args, server_flags
