"""The flags of bench_one_batch_server. Imports nothing heavy, so that `--help` is instant."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from sgl_jax.benchmark.arguments import real, whole_number
from sgl_jax.benchmark.errors import BenchmarkError
from sgl_jax.benchmark.server_process import START_TIMEOUT_S
from sgl_jax.flags import FlagError, read_command_line
from sgl_jax.server_args import FLAGS

_DESCRIPTION = """Measures the latency and throughput of single batches through a server: the one at --base-url, or
one that is started for it, and then every flag of the server is taken as well."""
_EPILOG = "The server's flags: python -m sgl_jax.launch_server --help."
# Of the server's flags, those that say something about one that runs. Published command lines have --model beside
# --base-url; that server has its model already.
_WITH_BASE_URL = {"model_path", "served_model_name", "tokenizer_path", "api_key"}


@dataclass(frozen=True)
class Case:
    batch_size: int
    input_len: int  # tokens of a prompt
    output_len: int

    def __str__(self) -> str:
        return f"batch size {self.batch_size}, input_len {self.input_len}, output_len {self.output_len}"


@dataclass(frozen=True)
class Target:
    """The server to measure."""

    base_url: str
    api_key: str | None = None
    served_model_name: str | None = None  # None: the first that the server lists
    tokenizer_path: str | None = None  # tells the vocabulary where the server does not


def cases(args: argparse.Namespace) -> list[Case]:
    """Every combination of the lists."""
    return [Case(*each) for each in itertools.product(args.batch_size, args.input_len, args.output_len)]


def parse_one_batch(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """The flags, and what is left for the server. Prints what is wrong and exits with code 2 where they cannot be
    honoured."""
    parser = one_batch_parser()
    args, server_flags = parser.parse_known_args(argv)
    if args.profile_output_dir is not None and not args.profile:
        parser.error("--profile-output-dir needs --profile")
    return args, server_flags


def one_batch_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sgl_jax.bench_one_batch_server",
        usage="%(prog)s [--base-url URL] [flags] [the server's flags]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34),
    )
    add = parser.add_argument
    add("--base-url", default="", metavar="URL", help="a server that runs (default: one is started)")
    add_batch_arguments(parser)
    add("--temperature", type=real(0), default=0.0, metavar="X", help="0 is greedy (default: 0)")
    add("--return-logprob", action="store_true", help="ask for the log probabilities of the output")
    add("--api-type", choices=("native", "openai"), default="native", help="/generate or /v1/completions")
    add("--skip-warmup", action="store_true", help="measure from the first request on")
    add("--profile", action="store_true", help="then run each case once more in a trace (POST /start_profile)")
    add("--profile-output-dir", metavar="PATH", help="where the server writes the traces (default: its own choice)")
    add("--show-report", action="store_true", help="print all cases as a markdown table at the end")
    add(
        "--start-timeout",
        type=real(0),
        default=START_TIMEOUT_S,
        metavar="SECONDS",
        help=f"how long the server that is started may take (default: {START_TIMEOUT_S:g})",
    )
    return parser


def add_batch_arguments(parser: argparse.ArgumentParser) -> None:
    """What bench_one_batch takes as well."""
    whole = {"type": whole_number(1), "nargs": "+", "metavar": "N"}
    add = parser.add_argument
    add("--batch-size", **whole, default=[1], help="prompts in a batch (default: 1)")
    add("--input-len", **whole, default=[1024], help="tokens of a prompt (default: 1024)")
    add("--output-len", **whole, default=[16], help="tokens to generate, the prefill's included (default: 16)")
    add("--seed", type=whole_number(0), default=1, metavar="N", help="of the random prompts (default: 1)")
    add("--run-name", default="default", metavar="NAME", help="a name for the results (default: default)")
    add(
        "--result-filename",
        default="result.jsonl",
        metavar="FILE",
        help="one JSON object per case is appended; '' for none (default: result.jsonl)",
    )


def running_target(base_url: str, server_flags: Sequence[str]) -> Target:
    """The server that runs at `base_url`; flags about how a server is started are refused."""
    try:
        given = read_command_line(FLAGS, server_flags, usage="", description="", epilog="", version="")
    except FlagError as error:
        raise BenchmarkError(str(error)) from None
    for name in given:
        if name not in _WITH_BASE_URL:
            option = "--" + name.replace("_", "-")
            raise BenchmarkError(f"{option} is for a server that is started; --base-url {base_url} runs already")
    given.pop("model_path", None)
    return Target(base_url, **given)
