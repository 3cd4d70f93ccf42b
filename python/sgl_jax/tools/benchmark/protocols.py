"""The APIs a server may speak: the body of a request, and what an answer or an event of its stream says.

A streamed event and a whole answer are read by the same function; a stream of the native API repeats all text so far,
OpenAI's streams carry what is new.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sgl_jax.tools.benchmark.records import Prompt
from sgl_jax.tools.benchmark.terminal import BenchmarkError

REQUEST_TIMEOUT_S = 6 * 3600.0


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


@dataclass
class Reading:
    """Everything that a server has said of one answer so far. None: not told."""

    text: str = ""
    output_tokens: int | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    aborted: str = ""  # the reason, when the server gave up


@dataclass(frozen=True)
class Protocol:
    path: str
    body: Callable[[Prompt, RequestOptions, str | None], dict[str, Any]]  # with the name of a LoRA adapter
    read: Callable[[dict[str, Any], Reading], None]


def request_body(
    protocol: Protocol, prompt: Prompt, options: RequestOptions, lora: str | None = None
) -> dict[str, Any]:
    """Raises BenchmarkError when the protocol cannot carry this kind of prompt."""
    return _merged(protocol.body(prompt, options, lora), options.extra_request_body)


def _merged(base: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(base)
    for name, value in extra.items():
        mine = found.get(name)
        found[name] = _merged(mine, value) if isinstance(mine, dict) and isinstance(value, dict) else value
    return found


def _given(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


# --- the native API ---------------------------------------------------------------------------------------------------


def _native_body(prompt: Prompt, options: RequestOptions, lora: str | None) -> dict[str, Any]:
    if prompt.kind == "messages":
        raise BenchmarkError(
            "the native API takes text or token ids, and these prompts are chat messages; "
            "use a chat backend, or --apply-chat-template with a tokenizer"
        )
    sampling = {"temperature": options.temperature, "max_new_tokens": prompt.output_len}
    return {"text" if prompt.kind == "text" else "input_ids": prompt.prompt} | _given(
        sampling_params=sampling | _given(ignore_eos=options.ignore_eos or None),
        stream=options.stream,
        return_logprob=options.return_logprob or None,
        lora_path=lora,
    )


def _read_native(event: dict[str, Any], reading: Reading) -> None:
    reading.text = event.get("text") or ""
    meta = event.get("meta_info") or {}
    reading.output_tokens = meta.get("completion_tokens", reading.output_tokens)
    reading.prompt_tokens = meta.get("prompt_tokens", reading.prompt_tokens)
    reading.cached_tokens = meta.get("cached_tokens", reading.cached_tokens)
    finish = meta.get("finish_reason")
    if isinstance(finish, dict) and finish.get("type") == "abort":
        reading.aborted = finish.get("message") or "no reason given"


# --- OpenAI's -----------------------------------------------------------------------------------------------------------


def _completions_body(prompt: Prompt, options: RequestOptions, lora: str | None) -> dict[str, Any]:
    if prompt.kind == "messages":
        raise BenchmarkError(
            "completions take text or token ids, and these prompts are chat messages; use a chat backend"
        )
    logprobs = 1 if options.return_logprob else None
    return _openai_body(options, lora, prompt=prompt.prompt, max_tokens=prompt.output_len, logprobs=logprobs)


def _chat_body(prompt: Prompt, options: RequestOptions, lora: str | None) -> dict[str, Any]:
    if prompt.kind == "ids":
        raise BenchmarkError(
            "chat takes text, and these prompts are token ids; use --dataset-name random, whose prompts are text, "
            "or a backend that is not chat"
        )
    messages = [{"role": "user", "content": prompt.prompt}] if prompt.kind == "text" else prompt.prompt
    logprobs = True if options.return_logprob else None
    return _openai_body(options, lora, messages=messages, max_completion_tokens=prompt.output_len, logprobs=logprobs)


def _openai_body(options: RequestOptions, lora: str | None, **own: Any) -> dict[str, Any]:
    return _given(
        **own,
        model=options.model if lora is None else lora,
        temperature=options.temperature,
        stream=options.stream,
        stream_options={"include_usage": True} if options.stream else None,
        ignore_eos=options.ignore_eos or None,  # not OpenAI's own; a server that refuses it needs --disable-ignore-eos
    )


def _read_openai(event: dict[str, Any], reading: Reading) -> None:
    for choice in event.get("choices") or ():
        said = choice.get("delta") or choice.get("message") or choice
        reading.text += said.get("reasoning_content") or said.get("reasoning") or ""
        reading.text += said.get("content") or said.get("text") or ""
        if choice.get("finish_reason") in ("abort", "error"):
            reading.aborted = "no reason given"
    usage = event.get("usage")
    if usage:
        reading.output_tokens = usage.get("completion_tokens", reading.output_tokens)
        reading.prompt_tokens = usage.get("prompt_tokens", reading.prompt_tokens)
        reading.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", reading.cached_tokens)


NATIVE = Protocol("/generate", _native_body, _read_native)
COMPLETIONS = Protocol("/v1/completions", _completions_body, _read_openai)
CHAT = Protocol("/v1/chat/completions", _chat_body, _read_openai)


class Backend(NamedTuple):
    protocol: Protocol
    port: int  # the engine of that name listens on by default


BACKENDS: dict[str, Backend] = {
    "sgl-jax": Backend(NATIVE, 30000),
    "sgl-jax-oai": Backend(COMPLETIONS, 30000),
    "sgl-jax-oai-chat": Backend(CHAT, 30000),
    "sglang": Backend(NATIVE, 30000),
    "sglang-native": Backend(NATIVE, 30000),
    "sglang-oai": Backend(COMPLETIONS, 30000),
    "sglang-oai-chat": Backend(CHAT, 30000),
    "openai": Backend(COMPLETIONS, 8000),
    "openai-chat": Backend(CHAT, 8000),
    "vllm": Backend(COMPLETIONS, 8000),
    "vllm-chat": Backend(CHAT, 8000),
    "lmdeploy": Backend(COMPLETIONS, 23333),
    "lmdeploy-chat": Backend(CHAT, 23333),
}
