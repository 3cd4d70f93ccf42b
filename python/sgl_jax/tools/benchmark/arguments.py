"""The flags of all measuring tools, each declared once. Imports nothing heavy, so that `--help` is instant."""

import argparse
import contextlib
import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sgl_jax.settings.flag_parser import FlagError, Parser, option_named
from sgl_jax.settings.server_args import FLAGS, SERVER, ServerArgs
from sgl_jax.tools.benchmark.protocols import BACKENDS
from sgl_jax.tools.benchmark.terminal import BenchmarkError

type Kind = dict[str, Any]  # argparse's settings for a flag's value
type Flags = Sequence[tuple[str, Kind | None, Any, str]]  # names, None for a switch, default, help


def _kind[T](metavar: str, read: Callable[[str], T], holds: Callable[[T], object], said: str) -> Kind:
    """Return the settings of a value that `read` makes from a text; a text is refused unless the value `holds`."""

    def checked(text: str) -> T:
        with contextlib.suppress(ValueError):
            if holds(value := read(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {said}")

    return {"type": checked, "metavar": metavar}


_COUNT = _kind("N", int, lambda n: n >= 1, "a whole number from 1 on")
_INDEX = _kind("N", int, lambda n: n >= 0, "a whole number from 0 on")
_REAL = _kind("X", float, lambda x: 0 <= x < float("inf"), "a number from 0 on")
_RATE = _kind("X", float, lambda x: x > 0, "a number above 0")
_FACTOR = _kind("X", float, lambda x: 0 < x < float("inf"), "a number above 0")
_RATIO = _kind("X", float, lambda x: 0 <= x <= 1, "a number between 0 and 1")
_URL = _kind("URL", str, re.compile("https?://").match, "a URL that begins with http:// or https://")
_HEADER = _kind("NAME=VALUE", str, re.compile("[^=]+=").match, "NAME=VALUE")
_OBJECT = _kind("JSON", json.loads, lambda value: isinstance(value, dict), "a JSON object")
_COUNTS: Kind = _COUNT | {"nargs": "+"}
_FILE: Kind = {"type": Path, "metavar": "FILE"}
_FILE_OR_NONE: Kind = {"type": lambda text: Path(text) if text else None, "metavar": "FILE"}
_TEXT: Kind = {"metavar": "TEXT"}

_LIMITS_FROM = "python -m sgl_jax.measure_limits --output FILE, before the server is started"
_SEED = ("--seed", _INDEX, 1, "of all that is drawn")
_JSON = ("--extra-request-body", _OBJECT, {}, "merged into every request, last")
_EOS = ("--disable-ignore-eos", None, False, "let answers end where the model ends them")
_TEMPERATURE = ("--temperature", _REAL, 0.0, "0 is greedy")
_LOGPROBS = ("--return-logprob", None, False, "ask for the logprobs of the output")
_WARM = ("--skip-warmup", None, False, "measure from the first request on")
_PROFILE = ("--profile", None, False, "record a trace")
_PROFILE_DIR = ("--profile-output-dir", _TEXT, None, "folder of the trace (default: the server or tool decides)")
_LIMITS = ("--machine-limits", _FILE, None, f"tell the share of the machine that was reached; {_LIMITS_FROM}")
_GSP, _MOST = "generated-shared-prefix:", "random, random-ids: most tokens"
_DATASETS: Kind = {"choices": ("random", "sharegpt", "custom", "generated-shared-prefix", "random-ids", "mooncake")}
_DATASET: Flags = [
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
    ("--mooncake-slowdown-factor", _FACTOR, 1.0, "mooncake: arrival times are multiplied by it"),
]
_ADDRESS: Flags = [
    ("--base-url", _URL, None, "instead of --host and --port"),
    ("--host", {}, "127.0.0.1", "where it listens"),
    ("--port", _COUNT, None, "(default: 30000; 8000 for openai and vllm, 23333 for lmdeploy)"),
    ("--header", _HEADER | {"action": "extend", "nargs": "+"}, [], "sent with each request"),
]
_SERVING: Flags = [
    ("--backend", {"choices": tuple(BACKENDS), "metavar": "NAME"}, "sgl-jax", f"its API: {', '.join(BACKENDS)}"),
    *_ADDRESS,
    ("--model", _TEXT, None, "as the server calls it (default: the first of /v1/models)"),
    ("--served-model-name", _TEXT, None, "sent instead of --model, where that is a path"),
    ("--tokenizer", _TEXT, None, "folder, .gguf file or hub id (default: the server's or --model, where it is here)"),
    ("--ready-check-timeout-sec", _REAL, 0.0, "wait so long for the server to be ready"),
    *_DATASET,
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
    ("--output-file", _FILE, None, "append the result to this file as a JSON line"),
]
_BATCHES: Flags = [
    ("--batch-size", _COUNTS, [1], "prompts in a batch"),
    ("--input-len", _COUNTS, [1024], "tokens of a prompt"),
    ("--output-len", _COUNTS, [16], "tokens to generate, the prefill's included"),
    ("--run-name", _TEXT, "default", "a name for the results"),
    ("--result-filename", _FILE_OR_NONE, Path("result.jsonl"), "one JSON object per case is appended; '' for none"),
    *(_SEED, _PROFILE),
]
_BATCHES_SERVED: Flags = [
    ("--backend", {"choices": ("sgl-jax",)}, "sgl-jax", "its native API, the only one"),
    *_ADDRESS,
    ("--model-path --model", _TEXT, None, "the model that the server must have; None takes any"),
    ("--show-report", None, False, "print all cases as a markdown table at the end"),
    *(*_BATCHES, _PROFILE_DIR, _LIMITS, _WARM, _TEMPERATURE, _LOGPROBS),
]
_ONE_BATCH: Flags = [
    *_BATCHES,
    ("--profile-filename-prefix", _TEXT, None, "traces go to PATH_batchB_inputI_outputO (default: profile)"),
]
_OFFLINE: Flags = [
    *_DATASET,
    ("--backend", {"choices": ("engine",)}, "engine", "sgl_jax.Engine, the only one"),
    ("--result-filename", _FILE_OR_NONE, None, "one JSON object is appended (default: none)"),
    *(_SEED, _EOS, _JSON, _WARM, _PROFILE, _PROFILE_DIR),
]
_DEVICES: Flags = [
    ("--device", {"choices": ("cpu", "gpu", "tpu")}, None, "kind of devices (default: the best there is)"),
    ("--num-devices", _COUNT, None, "as many as the server takes (default: all)"),
    ("--dtype", {"choices": ("bfloat16", "float32")}, None, "as the server computes (default: bfloat16)"),
    ("--output", _FILE, None, "write the limits as JSON, for --machine-limits of other tools"),
]


class Tool(NamedTuple):
    module: str  # beside this one; its `main` takes the flags, and those that are left for the server
    flags: Flags
    takes_server_flags: bool
    about: str


TOOLS = {
    "bench_serving": Tool("serving", _SERVING, False, "Sends requests to a server and measures what comes back."),
    "bench_one_batch_server": Tool("one_batch_server", _BATCHES_SERVED, False, "Measures batches through a server."),
    "bench_one_batch": Tool("one_batch", _ONE_BATCH, True, "Measures single batches in the engine, without a server."),
    "bench_offline_throughput": Tool("offline", _OFFLINE, True, "Measures how fast an engine works off a data set."),
    "measure_limits": Tool("machine_limits", _DEVICES, False, "Measures memory bandwidth and matmul rate of devices."),
}


def parse(tool: str, argv: Sequence[str] | None = None, prog: str = "") -> tuple[argparse.Namespace, list[str]]:
    """Parse a command line into the tool's flags, and those that are left for the server.

    There are no abbreviations where flags of the server are taken too. Raises FlagError for what cannot be honoured.
    """
    _, flags, takes_server_flags, about = TOOLS[tool]
    also = "Every flag of the server is taken as well (python -m sgl_jax.launch_server --help)."
    parser = Parser(
        prog=prog or f"python -m sgl_jax.{tool}",
        description=about,
        epilog=also if takes_server_flags else None,
        allow_abbrev=not takes_server_flags,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34),
    )
    for names, kind, default, text in flags:
        if kind is None:
            parser.add_argument(names, action="store_true", help=text)
            continue
        value = " ".join(map(str, default)) if isinstance(default, list) else default
        shown = "" if value in (None, "", {}) else f" (default: {value})"
        parser.add_argument(*names.split(), default=default, help=text + shown, **kind)
    args, rest = parser.parse_known_args(argv) if takes_server_flags else (parser.read(argv), [])
    given = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    for name in ("profile_output_dir", "profile_num_steps", "profile_filename_prefix"):
        if name in given and not args.profile:
            parser.error(f"{option_named(name)} needs --profile")
    if {"use_trace_timestamps", "request_rate"} <= given:
        parser.error("--use-trace-timestamps and --request-rate both say when to send; give one")
    if "output_details" in given and args.output_file is None:
        parser.error("--output-details needs --output-file")
    return args, rest


def server_arguments(flags: Sequence[str]) -> ServerArgs:
    """Parse the flags of a server to measure. Raises BenchmarkError for one that is refused."""
    try:
        args = ServerArgs.from_cli(flags)
    except FlagError as error:
        raise BenchmarkError(str(error)) from None
    if args.compile_only:
        raise BenchmarkError("--compile-only leaves nothing to measure; it is a flag of sgl_jax.launch_server alone")
    return args


def alone_arguments(flags: Sequence[str]) -> ServerArgs:
    """Parse the flags of a server whose steps are timed one by one. Raises BenchmarkError for one that is refused."""
    args = server_arguments(flags)
    if args.dp_size > 1:
        raise BenchmarkError(
            f"--dp-size is {args.dp_size}; this tool runs one batch on one rank, leave it out "
            "(bench_offline_throughput measures several)"
        )
    if args.speculation is not None:
        raise BenchmarkError(
            f"--speculative-algorithm is {args.speculation.algorithm}; this tool times steps of one token, leave it out "
            "(bench_offline_throughput measures drafts)"
        )
    return args


def engine_options(server_args: ServerArgs) -> dict[str, Any]:
    """Return arguments for `sgl_jax.Engine`: the flags that differ from their defaults, without the HTTP server's."""
    values = [(each, getattr(server_args, each.name)) for each in FLAGS if each.about.group != SERVER]
    return {each.name: value for each, value in values if not each.is_default(value)}


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
