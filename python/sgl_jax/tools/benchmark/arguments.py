"""The flags of tools that put a load on a server, and of data sets. Imports nothing heavy, so that `--help` is instant."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sgl_jax.settings.flag_parser import Parser
from sgl_jax.tools.benchmark.protocols import BACKENDS, REQUEST_TIMEOUT_S

NUM_PROMPTS = 1000  # of data sets that are drawn without end, or too large to be sent as a whole
MACHINE_LIMITS = """limits of the server's machine, for a report on what share of them was reached (default: none; made
with python -m sgl_jax.measure_limits --output FILE, before the server is started)"""
OF_TEXT = ("random", "sharegpt", "custom", "generated-shared-prefix")
OF_IDS = ("random-ids", "mooncake")


def serving_parser() -> Parser:
    parser = new_parser(
        "python -m sgl_jax.bench_serving [flags]\n       python -m sgl_jax.bench_serving sweep [flags]",
        "Sends the requests of a data set to a server and measures what comes back.",
        "`bench_serving sweep --help`: a grid of input and output lengths and concurrencies in one command.",
        allow_abbrev=True,
    )
    add_serving_arguments(parser)
    return parser


def parse_serving(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Raises FlagError for flags that cannot be honoured."""
    parser = serving_parser()
    args = parser.read(argv)
    if args.use_trace_timestamps and args.request_rate != float("inf"):
        parser.error("--use-trace-timestamps and --request-rate both say when to send; give one")
    if not args.profile and (args.profile_output_dir or args.profile_num_steps):
        parser.error("--profile-output-dir and --profile-num-steps need --profile")
    if args.tokenize_prompt and "chat" in args.backend:
        parser.error(f"--tokenize-prompt: --backend {args.backend} takes text only")
    if args.output_details and args.output_file is None:
        parser.error("--output-details needs --output-file")
    return args


def new_parser(usage: str, description: str, epilog: str | None = None, *, allow_abbrev: bool = False) -> Parser:
    """Without abbreviations by default: what a parser does not know may be a flag of the server."""
    return Parser(
        usage=usage,
        description=description,
        epilog=epilog,
        allow_abbrev=allow_abbrev,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34),
    )


def add_serving_arguments(parser: argparse.ArgumentParser) -> None:
    """All that bench_serving takes, group by group."""
    _add_server(parser)
    add_dataset_arguments(parser)
    add = parser.add_argument_group("Traffic").add_argument
    text = "requests per second, sent as a Poisson process (default: inf, all at once)"
    add("--request-rate", type=above_zero, default=float("inf"), metavar="X", help=text)
    add("--use-trace-timestamps", action="store_true", help="send each request at the time the data set gives")
    text = "requests at a time; others wait (default: no limit)"
    add("--max-concurrency", type=whole_number(1), metavar="N", help=text)

    add = parser.add_argument_group("Requests").add_argument
    add("--temperature", type=real(0), default=0.0, metavar="X", help="(default: 0, greedy)")
    add("--disable-ignore-eos", action="store_true", help="let answers end before their length")
    add("--disable-stream", action="store_true", help="ask for answers in one piece: only E2E is known")
    add("--return-logprob", action="store_true", help="ask for the logprobs of the output")
    text = """merged into every request, as in '{"sampling_params": {"top_p": 0.9}}'"""
    add("--extra-request-body", type=json_object, default={}, metavar="JSON", help=text)
    add("--lora-name", nargs="+", default=[], metavar="NAME", help="adapters; one is drawn for each request")
    text = "a request that takes longer has failed (default: six hours)"
    add("--request-timeout-sec", type=above_zero, default=REQUEST_TIMEOUT_S, metavar="X", help=text)

    add = parser.add_argument_group("Run").add_argument
    add("--seed", type=whole_number(0), default=1, metavar="N", help="of all that is drawn (default: 1)")
    text = "send the first prompt so often before the run, with at most 32 output tokens (default: 1)"
    add("--warmup-requests", type=whole_number(0), default=1, metavar="N", help=text)
    add("--flush-cache", action="store_true", help="empty the server's prefix cache before the run")
    add("--machine-limits", type=Path, metavar="FILE", help=MACHINE_LIMITS)
    add("--profile", action="store_true", help="have the server record a trace of the run")
    add("--profile-output-dir", metavar="PATH", help="where the server writes it (default: it decides)")
    add("--profile-num-steps", type=whole_number(1), metavar="N", help="steps to record (default: the run)")

    add = parser.add_argument_group("Output").add_argument
    add("--output-file", type=Path, metavar="FILE", help="append the result to this file as a JSON line")
    add("--output-details", action="store_true", help="with times and text of every request")
    add("--tag", metavar="TEXT", help="goes into the JSON, to tell runs apart")
    add("--plot", type=Path, metavar="FILE.png", help="draw the run over its time")
    add("--disable-tqdm", action="store_true", help="no progress bar; there is none without a terminal")


def _add_server(parser: argparse.ArgumentParser) -> None:
    ports = {port: name for name, (_, port) in reversed(BACKENDS.items())}
    shown = ", ".join(f"{port} for {name}" for port, name in sorted(ports.items(), reverse=True))
    add = parser.add_argument_group("Server").add_argument
    text = f"the server's API: {', '.join(BACKENDS)} (default: sgl-jax, the native /generate)"
    add("--backend", choices=tuple(BACKENDS), default="sgl-jax", metavar="NAME", help=text)
    add("--base-url", type=_url, metavar="URL", help="instead of --host and --port")
    add("--host", default="127.0.0.1", help="(default: 127.0.0.1)")
    add("--port", type=whole_number(1), metavar="N", help=f"(default: {shown})")
    add("--model", metavar="NAME", help="as the server calls it (default: the first of /v1/models)")
    add("--served-model-name", metavar="NAME", help="sent instead of --model, where that is a path")
    text = "a folder, a .gguf file or a hub id (default: the server's or --model, where it is on this machine)"
    add("--tokenizer", metavar="PATH", help=text)
    text = "sent with each request, such as Authorization='Bearer KEY'; several are taken"
    add("--header", type=_header, action="append", nargs="+", default=[], metavar="NAME=VALUE", help=text)
    text = "wait so long for the server to be ready (default: 0)"
    add("--ready-check-timeout-sec", type=real(0), default=0.0, metavar="X", help=text)


def add_dataset_arguments(parser: argparse.ArgumentParser) -> None:
    """Every flag that `datasets.load_prompts` reads."""
    add = parser.add_argument_group("Data set").add_argument

    def count(*names: str, default: int | None = None, about: str) -> None:
        text = about if default is None else f"{about} (default: {default})"
        add(*names, type=whole_number(1), default=default, metavar="N", help=text)

    text = "what is sent (default: random, text of drawn lengths)"
    add("--dataset-name", choices=(*OF_TEXT, *OF_IDS), default="random", help=text)
    text = "the file of sharegpt, custom and mooncake; for random a text to use instead of the bundled one"
    add("--dataset-path", metavar="PATH", help=text)
    count(
        "--num-prompts", about=f"prompts at most (default: {NUM_PROMPTS}; of generated-shared-prefix and custom, all)"
    )
    text = "random, random-ids: most tokens"
    count("--random-input-len", "--random-input", default=1024, about=f"{text} of a prompt, BOS included")
    count("--random-output-len", "--random-output", default=1024, about=f"{text} to generate")
    text = "random, random-ids: lengths are drawn evenly between X times the most and the most; 1: always the most"
    add("--random-range-ratio", type=_ratio, default=0.0, metavar="X", help=f"{text} (default: 0)")
    text = "sharegpt, custom: tokens to generate (default: as the data say, else the answer's)"
    count("--sharegpt-output-len", about=text)
    text = "sharegpt, custom: leave out what has more tokens, prompt and output together (default: sharegpt leaves out"
    count("--sharegpt-context-len", about=f"{text} prompts over 1024 and totals over 2048)")
    text = "generated-shared-prefix:"
    count("--gsp-num-groups", default=64, about=f"{text} groups of prompts that share a system prompt")
    count("--gsp-prompts-per-group", default=16, about=f"{text} prompts of a group")
    count("--gsp-system-prompt-len", default=2048, about=f"{text} tokens the prompts of a group share")
    count("--gsp-question-len", default=128, about=f"{text} tokens of a prompt after the shared ones")
    count("--gsp-output-len", default=256, about=f"{text} tokens to generate")
    workloads = ("mooncake", "conversation", "toolagent", "synthetic")
    text = "which of Mooncake's traces, where --dataset-path is their folder (default: conversation)"
    add("--mooncake-workload", choices=workloads, default="conversation", help=text)
    names = ("--trace-slowdown-factor", "--mooncake-slowdown-factor")
    add(
        *names,
        type=_finite,
        default=1.0,
        metavar="X",
        help="mooncake: arrival times are multiplied by this (default: 1)",
    )
    text = "put each prompt into the model's chat template, which then counts towards its length"
    add("--apply-chat-template", action="store_true", help=text)
    text = "text after each prompt, counted as well (default: none)"
    add("--prompt-suffix", default="", metavar="TEXT", help=text)
    add("--tokenize-prompt", action="store_true", help="send token ids instead of the prompts' text")


def dataset_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Read the flags of the data set."""
    parser = argparse.ArgumentParser()
    add_dataset_arguments(parser)
    return {name: getattr(args, name) for name in vars(parser.parse_args([]))}


def base_url(args: argparse.Namespace) -> str:
    if args.base_url:
        return args.base_url
    host = f"[{args.host}]" if ":" in args.host else args.host
    return f"http://{host}:{args.port or BACKENDS[args.backend].port}"


def headers(args: argparse.Namespace) -> dict[str, str]:
    return dict(pair for group in args.header for pair in group)


# --- values -----------------------------------------------------------------------------------------------------------


def whole_number(low: int) -> Callable[[str], int]:
    return _number(int, lambda value: value >= low, f"a whole number from {low} on")


def real(low: float) -> Callable[[str], float]:
    return _number(float, lambda value: low <= value < float("inf"), f"a number from {low:g} on")


def _number[T: (int, float)](kind: type[T], holds: Callable[[T], bool], said: str) -> Callable[[str], T]:
    def read(text: str) -> T:
        with contextlib.suppress(ValueError):
            if holds(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {said}")

    return read


above_zero = _number(float, lambda value: value > 0, "a number above 0")
_finite = _number(float, lambda value: 0 < value < float("inf"), "a number above 0")
_ratio = _number(float, lambda value: 0 <= value <= 1, "a number between 0 and 1")


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
