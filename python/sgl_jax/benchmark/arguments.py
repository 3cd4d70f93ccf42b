"""The flags of tools that put a load on a server. Imports nothing heavy, so that `--help` is instant."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sgl_jax.benchmark import datasets
from sgl_jax.benchmark.protocols import BACKENDS


def serving_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="python -m sgl_jax.bench_serving [flags]\n       python -m sgl_jax.bench_serving sweep [flags]",
        description="Sends the requests of a data set to a server and measures what comes back.",
        epilog="`bench_serving sweep --help`: a grid of input and output lengths and concurrencies in one command.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34),
    )
    add_server_arguments(parser)
    datasets.add_arguments(parser)
    add_traffic_arguments(parser)
    add_request_arguments(parser)
    add_run_arguments(parser)
    add_output_arguments(parser)
    return parser


def parse_serving(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Prints what is wrong and exits with code 2 for flags that cannot be honoured."""
    parser = serving_parser()
    args = parser.parse_args(argv)
    if args.use_trace_timestamps and args.request_rate != float("inf"):
        parser.error("--use-trace-timestamps and --request-rate both say when to send; give one")
    if not args.profile and (args.profile_output_dir or args.profile_num_steps):
        parser.error("--profile-output-dir and --profile-num-steps need --profile")
    if args.tokenize_prompt and "chat" in args.backend:
        parser.error(f"--tokenize-prompt: --backend {args.backend} takes text only")
    if args.output_details and args.output_file is None:
        parser.error("--output-details needs --output-file")
    return args


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Server")
    ports = {port: name for name, (_, port) in reversed(BACKENDS.items())}
    shown = ", ".join(f"{port} for {name}" for port, name in sorted(ports.items(), reverse=True))
    group.add_argument(
        "--backend",
        choices=tuple(BACKENDS),
        default="sgl-jax",
        metavar="NAME",
        help=f"the server's API: {', '.join(BACKENDS)} (default: sgl-jax, the native /generate)",
    )
    group.add_argument("--base-url", type=_url, metavar="URL", help="instead of --host and --port")
    group.add_argument("--host", default="127.0.0.1", help="(default: 127.0.0.1)")
    group.add_argument("--port", type=whole_number(1), metavar="N", help=f"(default: {shown})")
    group.add_argument("--model", metavar="NAME", help="as the server calls it (default: the first of /v1/models)")
    group.add_argument("--served-model-name", metavar="NAME", help="sent instead of --model, where that is a path")
    group.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="a folder, a .gguf file or a hub id (default: the server's or --model, where it is on this machine)",
    )
    group.add_argument(
        "--header",
        type=_header,
        action="append",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="sent with each request, such as Authorization='Bearer KEY'; several are taken",
    )
    group.add_argument(
        "--ready-check-timeout-sec",
        type=real(0),
        default=0.0,
        metavar="X",
        help="wait so long for the server to be ready (default: 0)",
    )


def add_traffic_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Traffic")
    group.add_argument(
        "--request-rate",
        type=_above_zero,
        default=float("inf"),
        metavar="X",
        help="requests per second, sent as a Poisson process (default: inf, all at once)",
    )
    group.add_argument(
        "--use-trace-timestamps", action="store_true", help="send each request at the time the data set gives"
    )
    group.add_argument(
        "--max-concurrency",
        type=whole_number(1),
        metavar="N",
        help="requests at a time; others wait (default: no limit)",
    )


def add_request_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Requests")
    group.add_argument("--temperature", type=real(0), default=0.0, metavar="X", help="(default: 0, greedy)")
    group.add_argument("--disable-ignore-eos", action="store_true", help="let answers end before their length")
    group.add_argument("--disable-stream", action="store_true", help="ask for answers in one piece: only E2E is known")
    group.add_argument("--return-logprob", action="store_true", help="ask for the logprobs of the output")
    group.add_argument(
        "--extra-request-body",
        type=json_object,
        default={},
        metavar="JSON",
        help="""merged into every request, as in '{"sampling_params": {"top_p": 0.9}}'""",
    )
    group.add_argument(
        "--lora-name", nargs="+", default=[], metavar="NAME", help="adapters; one is drawn for each request"
    )
    group.add_argument(
        "--request-timeout-sec",
        type=_above_zero,
        default=6 * 3600.0,
        metavar="X",
        help="a request that takes longer has failed (default: six hours)",
    )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Run")
    group.add_argument("--seed", type=whole_number(0), default=1, metavar="N", help="of all that is drawn (default: 1)")
    group.add_argument(
        "--warmup-requests",
        type=whole_number(0),
        default=1,
        metavar="N",
        help="send the first prompt so often before the run, with at most 32 output tokens (default: 1)",
    )
    group.add_argument("--flush-cache", action="store_true", help="empty the server's prefix cache before the run")
    group.add_argument("--profile", action="store_true", help="have the server record a trace of the run")
    group.add_argument("--profile-output-dir", metavar="PATH", help="where the server writes it (default: it decides)")
    group.add_argument(
        "--profile-num-steps", type=whole_number(1), metavar="N", help="steps to record (default: the run)"
    )


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Output")
    group.add_argument("--output-file", type=Path, metavar="FILE", help="append the result to this file as a JSON line")
    group.add_argument("--output-details", action="store_true", help="with times and text of every request")
    group.add_argument("--tag", metavar="TEXT", help="goes into the JSON, to tell runs apart")
    group.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the run over its time")
    group.add_argument("--disable-tqdm", action="store_true", help="no progress bar; there is none without a terminal")


def base_url(args: argparse.Namespace) -> str:
    if args.base_url:
        return args.base_url
    host = f"[{args.host}]" if ":" in args.host else args.host
    return f"http://{host}:{args.port or BACKENDS[args.backend].port}"


def headers(args: argparse.Namespace) -> dict[str, str]:
    return dict(pair for group in args.header for pair in group)


# --- values -----------------------------------------------------------------------------------------------------------


def whole_number(low: int):
    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} on")
        return value

    return read


def real(low: float):
    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {low:g} on")
        return value

    return read


def _above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _url(text: str) -> str:
    if not text.startswith(("http://", "https://")):
        raise argparse.ArgumentTypeError(f"{text!r} does not begin with http:// or https://")
    return text.rstrip("/")


def _header(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text} is not a JSON object")
    return value
