"""The flags of bench_one_batch_server, bench_one_batch and bench_offline_throughput: their own, and all of the server's.

Imports nothing heavy, so that `--help` is instant.
"""

from __future__ import annotations

import argparse
import itertools
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from sgl_jax.observability import log
from sgl_jax.settings.flag_parser import FlagError
from sgl_jax.settings.flags import read_command_line
from sgl_jax.settings.foreign_flags import ELSEWHERE
from sgl_jax.settings.server_args import FLAGS, SERVER, ServerArgs
from sgl_jax.tools.benchmark.arguments import (
    MACHINE_LIMITS,
    add_dataset_arguments,
    json_object,
    new_parser,
    real,
    whole_number,
)
from sgl_jax.tools.benchmark.server_process import START_TIMEOUT_S, server_arguments
from sgl_jax.tools.benchmark.terminal import BenchmarkError

logger = logging.getLogger(__name__)

_SERVERS_TOO = "Every flag of the server is taken as well (python -m sgl_jax.launch_server --help)."
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


def cases(args: argparse.Namespace) -> list[Case]:
    """Every combination of the lists."""
    return [Case(*each) for each in itertools.product(args.batch_size, args.input_len, args.output_len)]


def _path(text: str) -> Path | None:
    return Path(text) if text else None


def _add_batch_arguments(parser: argparse.ArgumentParser) -> None:
    whole = {"type": whole_number(1), "nargs": "+", "metavar": "N"}
    add = parser.add_argument
    add("--batch-size", **whole, default=[1], help="prompts in a batch (default: 1)")
    add("--input-len", **whole, default=[1024], help="tokens of a prompt (default: 1024)")
    add("--output-len", **whole, default=[16], help="tokens to generate, the prefill's included (default: 16)")
    add("--seed", type=whole_number(0), default=1, metavar="N", help="of the random prompts (default: 1)")
    add("--run-name", default="default", metavar="NAME", help="a name for the results (default: default)")
    text = "one JSON object per case is appended; '' for none (default: result.jsonl)"
    add("--result-filename", type=_path, default=Path("result.jsonl"), metavar="FILE", help=text)


# --- through a server -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """The server to measure."""

    base_url: str
    api_key: str | None = None
    served_model_name: str | None = None  # None: the first that the server lists
    tokenizer_path: str | None = None  # tells the vocabulary where the server does not


def one_batch_server_parser() -> argparse.ArgumentParser:
    parser = new_parser(
        "python -m sgl_jax.bench_one_batch_server [--base-url URL] [flags] [the server's flags]",
        "Measures the latency and throughput of single batches through a server: the one at --base-url, or one that is "
        "started for it, and then every flag of the server is taken as well.",
        "The server's flags: python -m sgl_jax.launch_server --help.",
    )
    add = parser.add_argument
    add("--base-url", default="", metavar="URL", help="a server that runs (default: one is started)")
    _add_batch_arguments(parser)
    add("--temperature", type=real(0), default=0.0, metavar="X", help="0 is greedy (default: 0)")
    add("--return-logprob", action="store_true", help="ask for the log probabilities of the output")
    add("--api-type", choices=("native", "openai"), default="native", help="/generate or /v1/completions")
    add("--skip-warmup", action="store_true", help="measure from the first request on")
    add("--machine-limits", type=Path, metavar="FILE", help=MACHINE_LIMITS)
    add("--profile", action="store_true", help="then run each case once more in a trace (POST /start_profile)")
    add("--profile-output-dir", metavar="PATH", help="where the server writes the traces (default: its own choice)")
    add("--show-report", action="store_true", help="print all cases as a markdown table at the end")
    text = f"how long the server that is started may take (default: {START_TIMEOUT_S:g})"
    add("--start-timeout", type=real(0), default=START_TIMEOUT_S, metavar="SECONDS", help=text)
    return parser


def parse_one_batch_server(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """The flags, and what is left for the server. Raises FlagError where they cannot be honoured."""
    parser = one_batch_server_parser()
    args, server_flags = parser.parse_known_args(argv)
    if args.profile_output_dir is not None and not args.profile:
        parser.error("--profile-output-dir needs --profile")
    return args, server_flags


def running_target(base_url: str, server_flags: Sequence[str]) -> Target:
    """The server that runs at `base_url`; flags about how a server is started are refused."""
    try:
        given = read_command_line(FLAGS, server_flags, elsewhere=ELSEWHERE)
    except FlagError as error:
        raise BenchmarkError(str(error)) from None
    for name in given:
        if name not in _WITH_BASE_URL:
            option = "--" + name.replace("_", "-")
            raise BenchmarkError(f"{option} is for a server that is started; --base-url {base_url} runs already")
    texts = {name: str(value) for name, value in given.items() if name != "model_path"}
    return Target(base_url, **texts)


# --- in a process of their own ----------------------------------------------------------------------------------------


def parse_one_batch(argv: Sequence[str] | None) -> tuple[argparse.Namespace, ServerArgs]:
    """Parse the flags of bench_one_batch. Raises BenchmarkError for a flag of the server that is refused."""
    parser = new_parser(
        "python -m sgl_jax.bench_one_batch --model-path PATH [flags]",
        "Measures single batches on the device: a prefill and decode steps, with no server and no scheduler. "
        + _SERVERS_TOO,
    )
    _add_batch_arguments(parser)
    parser.add_argument("--profile", action="store_true", help="then run each batch once more in a trace")
    text = "a batch's trace goes to the folder PATH_batchB_inputI_outputO (default: profile)"
    parser.add_argument("--profile-filename-prefix", metavar="PATH", help=text)
    return _read(parser, argv)


def parse_offline(argv: Sequence[str] | None) -> tuple[argparse.Namespace, ServerArgs]:
    """Parse the flags of bench_offline_throughput. Raises BenchmarkError for a flag of the server that is refused."""
    parser = new_parser(
        "python -m sgl_jax.bench_offline_throughput --model-path PATH [flags]",
        "Measures how fast an engine in this process works off a data set, all of it given at once. " + _SERVERS_TOO,
    )
    add_dataset_arguments(parser)
    add = parser.add_argument_group("Run").add_argument
    add("--backend", choices=("engine",), default="engine", help="sgl_jax.Engine, the only one (default: engine)")
    add("--seed", type=whole_number(0), default=1, metavar="N", help="of what the data set draws (default: 1)")
    add("--disable-ignore-eos", action="store_true", help="let answers end where the model ends them")
    text = "sampling parameters of every request, as in /generate: '{\"temperature\": 0.8}' (default: greedy)"
    add("--extra-request-body", type=json_object, default={}, metavar="JSON", help=text)
    add("--skip-warmup", action="store_true", help="measure from the first request on")
    add("--profile", action="store_true", help="then run the first prompts once more in a trace")
    add("--profile-output-dir", metavar="PATH", help="where the trace goes (default: profile_offline)")
    add("--result-filename", type=_path, metavar="FILE", help="one JSON object is appended (default: none)")
    return _read(parser, argv)


def _read(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> tuple[argparse.Namespace, ServerArgs]:
    """Parse the flags; one that `parser` does not know must be the server's."""
    args, rest = parser.parse_known_args(argv)
    for flag in ("profile_output_dir", "profile_filename_prefix"):
        if getattr(args, flag, None) is not None and not args.profile:
            raise BenchmarkError(f"--{flag.replace('_', '-')} needs --profile")
    server_args = server_arguments(rest)
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
