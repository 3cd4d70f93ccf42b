"""The flags of all measuring tools, each declared once. Imports nothing heavy, so that `--help` is instant."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sgl_jax.settings.flag_parser import FlagError, Parser, option_named
from sgl_jax.settings.server_args import ServerArgs
from sgl_jax.tools.benchmark.protocols import BACKENDS
from sgl_jax.tools.benchmark.terminal import BenchmarkError

type Kind = dict[str, Any]  # argparse's settings for a flag's value
type Rows = Sequence[tuple[str, Kind | None, Any, str]]  # names, None for a switch, default, help

START_TIMEOUT_S = 1800.0
OF_IDS = ("random-ids", "mooncake")


def _number[T: (int, float)](kind: type[T], holds: Callable[[T], bool], said: str, metavar: str = "X") -> Kind:
    def read(text: str) -> T:
        with contextlib.suppress(ValueError):
            if holds(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {said}")

    return {"type": read, "metavar": metavar}


def _url(text: str) -> str:
    if not text.startswith(("http://", "https://")):
        raise argparse.ArgumentTypeError(f"{text!r} does not begin with http:// or https://")
    return text.rstrip("/")


def _header(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text} is not a JSON object")
    return value


_COUNT = _number(int, lambda n: n >= 1, "a whole number from 1 on", "N")
_INDEX = _number(int, lambda n: n >= 0, "a whole number from 0 on", "N")
_REAL = _number(float, lambda x: 0 <= x < float("inf"), "a number from 0 on")
_RATE = _number(float, lambda x: x > 0, "a number above 0")
_FACTOR = _number(float, lambda x: 0 < x < float("inf"), "a number above 0")
_RATIO = _number(float, lambda x: 0 <= x <= 1, "a number between 0 and 1")
_COUNTS: Kind = _COUNT | {"nargs": "+"}
_FILE: Kind = {"type": Path, "metavar": "FILE"}
_FILE_OR_NONE: Kind = {"type": lambda text: Path(text) if text else None, "metavar": "FILE"}
_TEXT: Kind = {"metavar": "TEXT"}

_LIMITS_FROM = "python -m sgl_jax.measure_limits --output FILE, before the server is started"
_SEED = ("--seed", _INDEX, 1, "of all that is drawn")
_JSON = ("--extra-request-body", {"type": _json_object, "metavar": "JSON"}, {}, "merged into every request, last")
_EOS = ("--disable-ignore-eos", None, False, "let answers end where the model ends them")
_TEMPERATURE = ("--temperature", _REAL, 0.0, "0 is greedy")
_LOGPROBS = ("--return-logprob", None, False, "ask for the logprobs of the output")
_WARM = ("--skip-warmup", None, False, "measure from the first request on")
_PROFILE = ("--profile", None, False, "record a trace")
_PROFILE_DIR = ("--profile-output-dir", _TEXT, None, "folder of the trace (default: the server or tool decides)")
_LIMITS = ("--machine-limits", _FILE, None, f"tell the share of the machine that was reached; {_LIMITS_FROM}")
_START = ("--start-timeout", _REAL, START_TIMEOUT_S, "seconds that a server which is started may take")
_GSP, _MOST = "generated-shared-prefix:", "random, random-ids: most tokens"
_WORKLOADS: Kind = {"choices": ("mooncake", "conversation", "toolagent", "synthetic")}
_DATASETS: Kind = {"choices": ("random", "sharegpt", "custom", "generated-shared-prefix", *OF_IDS)}
_SERVER: Rows = [
    ("--backend", {"choices": tuple(BACKENDS), "metavar": "NAME"}, "sgl-jax", f"its API: {', '.join(BACKENDS)}"),
    ("--base-url", {"type": _url, "metavar": "URL"}, None, "instead of --host and --port"),
    ("--host", {}, "127.0.0.1", "where it listens"),
    ("--port", _COUNT, None, "(default: 30000; 8000 for openai and vllm, 23333 for lmdeploy)"),
    ("--model", _TEXT, None, "as the server calls it (default: the first of /v1/models)"),
    ("--served-model-name", _TEXT, None, "sent instead of --model, where that is a path"),
    ("--tokenizer", _TEXT, None, "folder, .gguf file or hub id (default: the server's or --model, where it is here)"),
    ("--header", {"type": _header, "action": "append", "nargs": "+"}, [], "NAME=VALUE, sent with each request"),
    ("--ready-check-timeout-sec", _REAL, 0.0, "wait so long for the server to be ready"),
]
_DATASET: Rows = [
    ("--dataset-name", _DATASETS, "random", "what is sent"),
    ("--dataset-path", _TEXT, None, "file of sharegpt, custom, mooncake; for random a text instead of the bundled one"),
    ("--num-prompts", _COUNT, None, f"prompts at most (default: 1000; of {_GSP[:-1]} and custom, all)"),
    ("--random-input-len --random-input", _COUNT, 1024, f"{_MOST} of a prompt, BOS included"),
    ("--random-output-len --random-output", _COUNT, 1024, f"{_MOST} to generate"),
    ("--random-range-ratio", _RATIO, 0.0, "random, random-ids: lengths are drawn evenly, from X times the most on"),
    ("--sharegpt-output-len", _COUNT, None, "sharegpt, custom: tokens to generate (default: as in the data)"),
    ("--sharegpt-context-len", _COUNT, None, "sharegpt, custom: leave out what has more tokens, prompt and output"),
    ("--gsp-num-groups", _COUNT, 64, f"{_GSP} groups of prompts that share a system prompt"),
    ("--gsp-prompts-per-group", _COUNT, 16, f"{_GSP} prompts of a group"),
    ("--gsp-system-prompt-len", _COUNT, 2048, f"{_GSP} tokens the prompts of a group share"),
    ("--gsp-question-len", _COUNT, 128, f"{_GSP} tokens of a prompt after the shared ones"),
    ("--gsp-output-len", _COUNT, 256, f"{_GSP} tokens to generate"),
    ("--mooncake-workload", _WORKLOADS, "conversation", "which trace, where --dataset-path is a folder of them"),
    (
        "--trace-slowdown-factor --mooncake-slowdown-factor",
        _FACTOR,
        1.0,
        "mooncake: arrival times are multiplied by it",
    ),
    ("--apply-chat-template", None, False, "put each prompt into the model's chat template, which then counts too"),
    ("--prompt-suffix", _TEXT, "", "text after each prompt, counted as well"),
    ("--tokenize-prompt", None, False, "send token ids instead of the prompts' text"),
]
_LOAD: Rows = [
    ("--request-rate", _RATE, float("inf"), "requests per second, as a Poisson process; inf: all at once"),
    ("--use-trace-timestamps", None, False, "send each request at the time the data set gives"),
    ("--max-concurrency", _COUNT, None, "requests at a time; others wait (default: no limit)"),
    *(_TEMPERATURE, _EOS, _LOGPROBS, _JSON, _SEED),
    ("--disable-stream", None, False, "ask for answers in one piece: only E2E is known"),
    ("--lora-name", _TEXT | {"nargs": "+"}, [], "adapters; one is drawn for each request"),
    ("--warmup-requests", _INDEX, 1, "send the first prompt so often before the run, for at most 32 output tokens"),
    ("--flush-cache", None, False, "empty the server's prefix cache before the run"),
    *(_LIMITS, _PROFILE, _PROFILE_DIR),
    ("--profile-num-steps", _COUNT, None, "steps to record (default: the run)"),
    ("--output-details", None, False, "write times and text of every request as well"),
    ("--tag", _TEXT, None, "goes into the JSON, to tell runs apart"),
    ("--disable-tqdm", None, False, "no progress bar; there is none without a terminal"),
]
_FILES: Rows = [
    ("--output-file", _FILE, None, "append the result to this file as a JSON line"),
]
_SWEEP: Rows = [
    ("--isl", _COUNTS | {"required": True}, None, "tokens of a prompt"),
    ("--osl", _COUNTS | {"required": True}, None, "tokens to generate"),
    ("--concurrency", _COUNTS | {"required": True}, None, "requests at a time"),
    ("--output-dir", {"type": Path, "required": True}, None, "folder of results.jsonl and the pictures"),
    ("--rounds", _COUNT, 3, "prompts of a case are N x concurrency, at least 4; --num-prompts is for all cases"),
    ("--model-path", _TEXT, None, "start a server with this model (default: one runs)"),
    _START,
]
_BATCHES: Rows = [
    ("--batch-size", _COUNTS, [1], "prompts in a batch"),
    ("--input-len", _COUNTS, [1024], "tokens of a prompt"),
    ("--output-len", _COUNTS, [16], "tokens to generate, the prefill's included"),
    ("--run-name", _TEXT, "default", "a name for the results"),
    ("--result-filename", _FILE_OR_NONE, Path("result.jsonl"), "one JSON object per case is appended; '' for none"),
    *(_SEED, _PROFILE),
]
_BATCHES_SERVED: Rows = [
    ("--base-url", {"metavar": "URL"}, "", "a server that runs (default: one is started)"),
    ("--show-report", None, False, "print all cases as a markdown table at the end"),
    *(*_BATCHES, _PROFILE_DIR, _LIMITS, _WARM, _START, _TEMPERATURE, _LOGPROBS),
]
_ONE_BATCH: Rows = [
    *_BATCHES,
    ("--profile-filename-prefix", _TEXT, None, "traces go to PATH_batchB_inputI_outputO (default: profile)"),
]
_OFFLINE: Rows = [
    *_DATASET,
    ("--backend", {"choices": ("engine",)}, "engine", "sgl_jax.Engine, the only one"),
    ("--result-filename", _FILE_OR_NONE, None, "one JSON object is appended (default: none)"),
    *(_SEED, _EOS, _JSON, _WARM, _PROFILE, _PROFILE_DIR),
]
_DEVICES: Rows = [
    ("--device", {"choices": ("cpu", "gpu", "tpu")}, None, "kind of devices (default: the best there is)"),
    ("--num-devices", _COUNT, None, "as many as the server takes (default: all)"),
    ("--dtype", {"choices": ("bfloat16", "float32")}, None, "as the server computes (default: bfloat16)"),
    ("--output", _FILE, None, "write the limits as JSON, for --machine-limits of other tools"),
]
_STAGES: Rows = [
    ("profile", {"type": Path}, None, "an .xplane.pb file, or a folder: its newest one"),
]


class Tool(NamedTuple):
    about: str
    rows: Rows
    takes_server_flags: bool = False


# The flags of bench_serving that a sweep does not have: it sets them for each case, or writes to --output-dir.
_CASES = ("--max-concurrency", "--random-input-len --random-input", "--random-output-len --random-output")
_OF_SWEEPS = [row for row in (*_SWEEP, *_SERVER, *_DATASET, *_LOAD) if row[0] not in _CASES]
TOOLS = {
    "bench_serving": Tool(
        "Sends the requests of a data set to a server and measures what comes back. `bench_serving sweep --help`: a grid "
        "of input and output lengths and concurrencies in one command.",
        (*_SERVER, *_DATASET, *_LOAD, *_FILES),
    ),
    "sweep": Tool(
        "Measures a grid of input lengths (ISL), output lengths (OSL) and concurrencies. Run again with the same flags it "
        "skips what is measured already, so a sweep that was stopped goes on.",
        _OF_SWEEPS,
        True,
    ),
    "bench_one_batch_server": Tool(
        "Measures the latency and throughput of single batches through a server: the one at --base-url, or one that is "
        "started for it.",
        _BATCHES_SERVED,
        True,
    ),
    "bench_one_batch": Tool(
        "Measures single batches in the engine, without a server: a prefill and decode steps.", _ONE_BATCH, True
    ),
    "bench_offline_throughput": Tool(
        "Measures how fast an engine in this process works off a data set, all of it given at once.", _OFFLINE, True
    ),
    "measure_limits": Tool("Measures how fast this machine's devices read memory and multiply matrices.", _DEVICES),
    "profile_stages": Tool("Where a profile's time went.", _STAGES),
}


def make_parser(tool: str) -> Parser:
    """Make the parser of a tool, without abbreviations where flags of the server are taken too."""
    about, rows, takes_server_flags = TOOLS[tool]
    also = "Every flag of the server is taken as well (python -m sgl_jax.launch_server --help)."
    parser = Parser(
        prog=f"python -m sgl_jax.{'bench_serving sweep' if tool == 'sweep' else tool}",
        description=about,
        epilog=also if takes_server_flags else None,
        allow_abbrev=not takes_server_flags,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34),
    )
    for names, kind, default, about in rows:
        if kind is None:
            parser.add_argument(names, action="store_true", help=about)
            continue
        text = " ".join(map(str, default)) if isinstance(default, list) else default
        shown = "" if text in (None, "", {}) else f" (default: {text})"
        parser.add_argument(*names.split(), default=default, help=about + shown, **kind)
    if tool == "sweep":  # lengths are exact unless asked otherwise: they name the cases
        parser.set_defaults(random_range_ratio=1.0)
    return parser


def parse(tool: str, argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Parse a command line into the tool's flags, and those that are left for the server. Raises FlagError for what cannot be honoured."""
    parser = make_parser(tool)
    args, rest = parser.parse_known_args(argv) if TOOLS[tool].takes_server_flags else (parser.read(argv), [])
    given = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    for name in ("profile_output_dir", "profile_num_steps", "profile_filename_prefix"):
        if name in given and not args.profile:
            parser.error(f"{option_named(name)} needs --profile")
    if {"use_trace_timestamps", "request_rate"} <= given:
        parser.error("--use-trace-timestamps and --request-rate both say when to send; give one")
    if "tokenize_prompt" in given and "chat" in args.backend:
        parser.error(f"--tokenize-prompt: --backend {args.backend} takes text only")
    if tool == "bench_serving" and args.output_details and args.output_file is None:
        parser.error("--output-details needs --output-file")
    if tool == "sweep":
        rest = _server_flags_of_sweep(parser, args, given, rest)
    return args, rest


def _server_flags_of_sweep(parser: Parser, args: argparse.Namespace, given: set[str], rest: list[str]) -> list[str]:
    if args.dataset_name not in ("random", "random-ids"):
        parser.error(f"--dataset-name is {args.dataset_name}; a sweep sets lengths, choose random or random-ids")
    if args.model_path is None:
        if rest:
            parser.error(f"{rest[0]} is not a flag of a sweep; the server's are taken with --model-path")
        return []
    if args.base_url is not None:
        parser.error(f"--model-path starts a server, and --base-url {args.base_url} names one that runs; give one")
    both = {"host", "port", "served_model_name"} & given  # both tools have these
    same = itertools.chain.from_iterable((option_named(name), str(getattr(args, name))) for name in sorted(both))
    return ["--model-path", args.model_path, *rest, *same]


def server_arguments(flags: Sequence[str]) -> ServerArgs:
    """Parse the flags of a server to measure. Raises BenchmarkError for one that is refused."""
    try:
        args = ServerArgs.from_cli(flags)
    except FlagError as error:
        raise BenchmarkError(str(error)) from None
    if args.compile_only:
        raise BenchmarkError("--compile-only leaves nothing to measure; it is a flag of sgl_jax.launch_server alone")
    return args


@dataclass(frozen=True)
class Case:
    batch_size: int
    input_len: int  # tokens of a prompt
    output_len: int

    def __str__(self) -> str:
        return f"batch size {self.batch_size}, input_len {self.input_len}, output_len {self.output_len}"


def cases(args: argparse.Namespace) -> list[Case]:
    """Return every combination of the lists of sizes."""
    return [Case(*each) for each in itertools.product(args.batch_size, args.input_len, args.output_len)]
