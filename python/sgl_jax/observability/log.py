"""Lines that the server prints. Everything but `setup` and `once` is a pure function from values to text."""

from __future__ import annotations

import contextlib
import logging
import shlex
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

if TYPE_CHECKING:
    from sgl_jax.engine.messages import Stats

READY = "The server is fired up and ready to roll!"  # scripts of the SGLang family wait for these words

QUIET_PATHS = frozenset(
    {"/health", "/ready", "/ping", "/metrics", "/load", "/get_load"}
)  # asked every few seconds by probes and scrapers


class _Formatter(logging.Formatter):
    """Writes `[2025-01-31 12:00:00] message`, with the time on each line; warnings and worse carry their level."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        prefix = f"[{self.formatTime(record, '%Y-%m-%d %H:%M:%S')}] "
        if record.levelno >= logging.WARNING:
            prefix += f"{record.levelname}: "
        return prefix + record.message.replace("\n", "\n" + prefix)


class _Handler(logging.StreamHandler[Any]):
    """Writes to the present sys.stderr, which a progress bar replaces so that lines go above it."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def setup(level: str = "info") -> None:
    """Take over the root logger, from an earlier `setup` too. This is for a process of ours, never for a program that imports us.

    Our lines and uvicorn's appear from `level` up, those of other libraries from WARNING up. Start uvicorn with
    `log_config=None`, or it puts its own handlers back.
    """
    handler = _Handler()
    handler.setFormatter(_Formatter())
    root = logging.getLogger()
    for old in [h for h in root.handlers if isinstance(h, _Handler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(max(logging.WARNING, logging.getLevelNamesMapping()[level.upper()]))
    for name in ("sgl_jax", "uvicorn", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(level.upper())


@contextlib.contextmanager
def heard() -> Iterator[None]:
    """Show our lines on the terminal while the block runs, if the program that imports us has set up no logging."""
    ours = logging.getLogger("sgl_jax")
    if ours.hasHandlers() or not sys.stderr.isatty():
        yield
        return
    handler, level = _Handler(), ours.level
    handler.setFormatter(_Formatter())
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    try:
        yield
    finally:
        ours.removeHandler(handler)
        ours.setLevel(level)


def once(logger: logging.Logger, key: str, message: str, level: int = logging.INFO) -> None:
    """Log the message the first time this logger is given the key. The logger itself remembers."""
    said: set[str] = logger.__dict__.setdefault("said_once", set())
    if key not in said:
        said.add(key)
        logger.log(level, "%s", message)


# --- start-up --------------------------------------------------------------------------------------------------------


def banner(version: str, model: str, devices: Sequence[str]) -> str:
    """Return "sgl_jax 0.1.0 | model Qwen/Qwen3-8B | 4 x TPU v6 lite"; `devices` has a name for each device."""
    kinds = ", ".join(f"{count} x {kind}" for kind, count in Counter(devices).items())
    return f"sgl_jax {version} | model {model} | {kinds}"


def unused_devices_line(platform: str, used: int, present: int, groups: int) -> str:
    """Say how many devices are not used. `groups` is --dp-size, from which the --tp-size that takes all follows."""
    advice = f"; --tp-size {present // groups} takes all" if present % groups == 0 else ""
    return f"{present - used} of {present} {platform} devices are not used{advice}"


def changed_args_line(changed: Mapping[str, object]) -> str:
    """Write the values that differ from the defaults (ServerArgs.changed()) as a command line that can be copied."""
    words = []
    for name, value in changed.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            values = value if isinstance(value, tuple) else (value,)
            words.append(f"--{option} {shlex.join(map(str, values))}")
    return "Arguments: " + (" ".join(words) or "all at their defaults")


def weights_line(num_bytes: int, seconds: float) -> str:
    speed = f" ({size(int(num_bytes / seconds))}/s)" if seconds > 0 else ""
    return f"Weights loaded: {size(num_bytes)} read in {seconds:.1f} s{speed}"


def memory_table(*, weights: int, kv: int, free: int, kv_tokens: int, context_length: int) -> str:
    """Say how the bytes of one device will be used, and how many requests the KV pool holds."""
    requests = kv_tokens / context_length
    return (
        f"Memory per device:\n  weights   {size(weights):>10}\n"
        f"  KV cache  {size(kv):>10}  {kv_tokens:,} tokens: {requests:,.1f} requests of the full context ({context_length:,})\n"
        f"  free      {size(free):>10}"
    )


def compile_line(index: int, total: int, *, program: str, seconds: float, cache_hit: bool) -> str:
    """Say that a program is ready: "[1/8] tokens=64 rows=16 after 2.5 s (cache miss)". `index` counts from 1, `seconds` from
    the start of compiling."""
    return f"[{index}/{total}] {program} after {seconds:.1f} s" + (" (cache hit)" if cache_hit else " (cache miss)")


def start_line(num_programs: int) -> str:
    """Say what a start does now, and why the first one takes longest."""
    if not num_programs:
        return "Reading weights; programs are compiled beside requests"
    return f"Reading weights; {num_programs} programs are read from the compile cache or, at a first start, compiled"


def programs_line(total: int, hits: int, seconds: float) -> str:
    first = f", {total - hits} compiled: the first start takes longest" if total > hits else ""
    return f"{total} programs ready after {seconds:.1f} s: {hits} from the cache{first}"


def size(num_bytes: int) -> str:
    for exponent, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if num_bytes >= 1024**exponent:
            return f"{num_bytes / 1024**exponent:.1f} {unit}"
    return f"{num_bytes} B"


def access_line(
    client: tuple[str, int] | None,
    request: str,
    status: int,
    request_id: str,
    tokens: tuple[int, int] | None,
    seconds: float,
    adapters: Collection[str] = (),
) -> str:
    """Return `127.0.0.1:5 - "POST /generate HTTP/1.1" 200 id=a 5+16 tokens 0.120 s`. `tokens`: of prompts and output."""
    where = f"{client[0]}:{client[1]}" if client else "-"
    said = request if len(request) <= 512 else request[:512] + "…"
    counted = "" if tokens is None else f" {tokens[0]}+{tokens[1]} tokens"
    counted += "".join(f" adapter={quote(name)}" for name in sorted(adapters))
    return f'{where} - "{said}" {status} id={request_id}{counted} {seconds:.3f} s'


def address_line(url: str, *, pages: bool) -> str:
    """Say what to open. An address that means all of the machine's is none that a browser opens everywhere."""
    at = url.replace("//0.0.0.0:", "//localhost:").replace("//[::]:", "//localhost:")
    return f"Open {at}/ to chat, {at}/dashboard for the dashboard" if pages else f"OpenAI's API is at {at}/v1"


# --- while serving: SGLang's formats, which dashboards parse ---------------------------------------------------------


def prefill_line(stats: Stats, num_new_requests: int, num_new_tokens: int, num_cached_tokens: int) -> str:
    return (
        f"Prefill batch. #new-seq: {num_new_requests}, #new-token: {num_new_tokens}, #cached-token: {num_cached_tokens}, "
        f"token usage: {stats.kv_usage:.2f}, #running-req: {stats.num_running}, #queue-req: {stats.num_waiting}"
    )


def decode_line(stats: Stats, num_tokens: int, simulated: bool = False) -> str:
    """Describe the decode steps of an interval. `num_tokens`: of all running requests; `simulated`: acceptance is."""
    kind = "SIMULATED accept" if simulated else "accept"
    accept = f"{kind} len: {stats.spec_accept_length:.2f}, accept rate: {stats.spec_accept_rate:.2f}, "
    return (
        f"Decode batch. #running-req: {stats.num_running}, #token: {num_tokens}, token usage: {stats.kv_usage:.2f}, "
        f"{accept if stats.accepted_per_position else ''}"
        f"gen throughput (token/s): {stats.gen_throughput:.2f}, #queue-req: {stats.num_waiting}"
    )


def low_acceptance_line(draft_model: str, accepted: int, total: int, least: float) -> str:
    """Say that a draft model's first drafts are accepted less often than can be right, and the likely causes."""
    return (
        f"{accepted} of {total} first drafts of {draft_model} were accepted, less than {least:.0%}: answers are right, but slow. "
        "Either it is no draft model of this target (--speculative-draft-model-path), or it reads other layers than it was "
        "trained on (eagle_aux_hidden_state_layer_ids in its config.json)"
    )
