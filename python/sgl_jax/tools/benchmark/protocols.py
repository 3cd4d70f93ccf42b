"""Requests of a benchmark, their outcomes, and the APIs that carry them: how a body is made and an answer is read.

A streamed event and a whole answer are read by the same function; a stream of the native API repeats all text so far,
OpenAI's streams carry what is new.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sgl_jax.tools.benchmark.terminal import BenchmarkError


@dataclass(frozen=True)
class Prompt:
    """One request to send."""

    prompt: str | list[int]  # text or token ids
    prompt_len: int  # tokens, as the tokenizer at hand counts them
    output_len: int  # tokens to generate
    arrival_s: float | None = None  # seconds after the start of the run, in data sets that carry times


@dataclass
class Outcome:
    """The outcome of one request. Times are seconds on the event loop's clock.

    `itl_s` has one gap per token after the first event; tokens that arrive together share their gap equally.
    """

    prompt_len: int
    sent_s: float
    error: str = ""  # why it failed; empty when it did not
    text: str = ""
    output_len: int = 0  # tokens generated, as the server counts them
    ttft_s: float | None = None  # from sending to the first token; None: the answer came in one piece
    latency_s: float = 0.0  # from sending to the end of the answer
    itl_s: list[float] = field(default_factory=list)
    # As the server tells so far; None: it does not.
    output_tokens: int | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    draft_steps: int = 0  # steps in which drafts were verified
    accepted_drafts: int = 0
    aborted: str = ""  # the reason, when the server gave up

    @property
    def ok(self) -> bool:
        return not self.error


@dataclass(frozen=True)
class RequestOptions:
    """Options that all requests of a run have in common."""

    model: str | None = None  # OpenAI's APIs name it; the native one does not
    temperature: float = 0.0
    ignore_eos: bool = True
    stream: bool = True
    return_logprob: bool = False
    # Merged into the body last, objects field by field.
    extra_request_body: Mapping[str, Any] = field(default_factory=dict)


def _read_native(event: dict[str, Any], outcome: Outcome) -> None:
    outcome.text = event.get("text") or ""
    meta = event.get("meta_info") or {}
    outcome.output_tokens = meta.get("completion_tokens", outcome.output_tokens)
    outcome.prompt_tokens = meta.get("prompt_tokens", outcome.prompt_tokens)
    outcome.cached_tokens = meta.get("cached_tokens", outcome.cached_tokens)
    outcome.draft_steps = meta.get("spec_verify_ct", 0)
    outcome.accepted_drafts = meta.get("spec_accepted_drafts", 0)
    finish = meta.get("finish_reason")
    if isinstance(finish, dict) and finish.get("type") == "abort":
        outcome.aborted = finish.get("message") or "no reason given"


def _read_openai(event: dict[str, Any], outcome: Outcome) -> None:
    for choice in event.get("choices") or ():
        said = choice.get("delta") or choice.get("message") or choice
        outcome.text += said.get("reasoning_content") or said.get("reasoning") or ""
        outcome.text += said.get("content") or said.get("text") or ""
        if choice.get("finish_reason") in ("abort", "error"):
            outcome.aborted = "no reason given"
    if usage := event.get("usage"):
        outcome.output_tokens = usage.get("completion_tokens", outcome.output_tokens)
        outcome.prompt_tokens = usage.get("prompt_tokens", outcome.prompt_tokens)
        outcome.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", outcome.cached_tokens)


class Protocol(NamedTuple):
    path: str
    read: Callable[[dict[str, Any], Outcome], None]
    text: str  # field of a prompt's text
    ids: str | None  # field of its token ids; None: it takes text only
    max_tokens: str  # field of the output length
    logprobs: int | bool = True  # value that asks for them


NATIVE = Protocol("/generate", _read_native, "text", "input_ids", "max_new_tokens")
COMPLETIONS = Protocol("/v1/completions", _read_openai, "prompt", "prompt", "max_tokens", 1)
CHAT = Protocol("/v1/chat/completions", _read_openai, "messages", None, "max_completion_tokens")


class BenchBackend(NamedTuple):
    protocol: Protocol
    port: int  # the engine of that name listens on by default


BACKENDS = {
    "sgl-jax": BenchBackend(NATIVE, 30000),
    "sgl-jax-oai": BenchBackend(COMPLETIONS, 30000),
    "sgl-jax-oai-chat": BenchBackend(CHAT, 30000),
    "sglang": BenchBackend(NATIVE, 30000),
    "sglang-native": BenchBackend(NATIVE, 30000),
    "sglang-oai": BenchBackend(COMPLETIONS, 30000),
    "sglang-oai-chat": BenchBackend(CHAT, 30000),
    "openai": BenchBackend(COMPLETIONS, 8000),
    "openai-chat": BenchBackend(CHAT, 8000),
    "vllm": BenchBackend(COMPLETIONS, 8000),
    "vllm-chat": BenchBackend(CHAT, 8000),
    "lmdeploy": BenchBackend(COMPLETIONS, 23333),
    "lmdeploy-chat": BenchBackend(CHAT, 23333),
}


def request_body(
    protocol: Protocol, prompt: Prompt, options: RequestOptions, lora: str | None = None
) -> dict[str, Any]:
    """Make the body of a request. Raises BenchmarkError when the protocol cannot carry token ids."""
    said: Any = prompt.prompt
    name = protocol.text if isinstance(said, str) else protocol.ids
    if name is None:
        raise BenchmarkError(
            "chat takes text, and these prompts are token ids; use --dataset-name random, whose prompts are text, or a "
            "backend that is not chat"
        )
    if protocol is CHAT:
        said = [{"role": "user", "content": said}]
    body: dict[str, Any] = {name: said, "stream": options.stream}
    sampling = {"temperature": options.temperature, protocol.max_tokens: prompt.output_len}
    if options.ignore_eos:  # not OpenAI's own; a server that refuses it needs --disable-ignore-eos
        sampling["ignore_eos"] = True
    if protocol is NATIVE:
        body |= {"sampling_params": sampling, "lora_path": lora, "return_logprob": options.return_logprob or None}
    else:
        body |= {**sampling, "model": lora or options.model}
        body["logprobs"] = protocol.logprobs if options.return_logprob else None
        body["stream_options"] = {"include_usage": True} if options.stream else None
    return _merged({name: value for name, value in body.items() if value is not None}, options.extra_request_body)


def _merged(base: Any, extra: Any) -> Any:
    """Merge objects field by field; other values are replaced."""
    if not (isinstance(base, dict) and isinstance(extra, dict)):
        return extra
    return base | {name: _merged(base.get(name), value) for name, value in extra.items()}
