"""Shapes of the answers, which msgspec encodes and /openapi.json describes."""

from collections.abc import Sequence
from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from sgl_jax.engine.messages import ProfileStatus as ProfileStatus

type ChatFinish = Literal["stop", "length", "abort", "tool_calls"]


class ErrorBody(msgspec.Struct):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(msgspec.Struct):
    error: ErrorBody


class PromptTokensDetails(msgspec.Struct):
    cached_tokens: int


class CompletionTokensDetails(msgspec.Struct):
    reasoning_tokens: int


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | UnsetType = UNSET


class TopLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    content: list[ChatTokenLogprob]
    refusal: None = None


class CalledFunction(msgspec.Struct):
    name: str
    arguments: str


class AnsweredCall(msgspec.Struct):
    id: str
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(msgspec.Struct):
    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[AnsweredCall] | UnsetType = UNSET


class ChatChoice(msgspec.Struct):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinish | None


class ChatCompletion(msgspec.Struct):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: None = None


class CompletionLogprobs(msgspec.Struct):
    """OpenAI's older format: parallel lists, with None for the first token of an echoed prompt."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length", "abort"]


class Completion(msgspec.Struct):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    system_fingerprint: None = None


class ResponseObject(msgspec.Struct):
    """A response of the Responses API, which has the fields of its request, too."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed", "cancelled"]
    model: str
    output: list[dict[str, Any]]
    error: dict[str, str] | None
    incomplete_details: dict[str, str] | None
    usage: dict[str, Any] | None


class ItemList(msgspec.Struct):
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: Literal["list"] = "list"


class DeletedResponse(msgspec.Struct):
    id: str
    object: Literal["response.deleted"] = "response.deleted"
    deleted: bool = True


class ModelCard(msgspec.Struct):
    id: str
    created: int
    root: str
    max_model_len: int
    parent: str | None = None  # the model that an adapter changes
    object: Literal["model"] = "model"
    owned_by: Literal["sgl_jax"] = "sgl_jax"


class ModelList(msgspec.Struct):
    data: list[ModelCard]
    object: Literal["list"] = "list"


class GenerateAnswer(msgspec.Struct, omit_defaults=True):
    """Answer of /generate; `index` is set in streams of several answers."""

    text: str
    output_ids: list[int]
    meta_info: dict[str, Any]
    index: int | None = None


class TokenizeResponse(msgspec.Struct):
    """Answer of /tokenize. For a list of prompts all but `max_model_len` are lists with one entry per prompt."""

    tokens: list[int | list[int]]
    count: int | list[int]
    max_model_len: int
    token_strs: Sequence[str | list[str]] | UnsetType = UNSET


class DetokenizeResponse(msgspec.Struct):
    text: str | list[str]


class Status(msgspec.Struct):
    status: str


class Version(msgspec.Struct):
    version: str


class CacheFlush(msgspec.Struct):
    success: bool
    num_pages: int


class LoadedAdapters(msgspec.Struct):
    success: bool
    loaded_adapters: dict[str, str]  # paths by name


class TrainerAnswer(msgspec.Struct):
    success: bool
    message: str
    num_paused_requests: int  # live requests that wait until generation goes on


class Aborted(msgspec.Struct):
    num_aborted: int


class ModelInfo(msgspec.Struct):
    model_path: str
    tokenizer_path: str
    is_generation: bool
    preferred_sampling_params: None
    architecture: str
    dtype: str
    context_length: int
    vocab_size: int
    weight_version: str  # the name that the last update gave its weights


class ServerInfo(msgspec.Struct):
    """Answer of /get_server_info, which also has every flag at the top level, where SGLang's clients look for them."""

    version: str
    tokenizer_path: str
    internal_states: list[dict[str, Any]]


class Load(msgspec.Struct):
    server_load: int


class RankLoad(msgspec.Struct):
    dp_rank: int
    num_reqs: int  # running and waiting
    num_waiting_reqs: int
    num_tokens: int  # held in the KV cache by running requests, in whole pages


class AddedTokenInfo(msgspec.Struct):
    content: str
    special: bool


class TokenizerInfo(msgspec.Struct):
    """Answer of /tokenizer_info, which also has the special tokens by name: `bos_token`, `eos_token`, …"""

    tokenizer_class: str | None  # as the model's files name it; None: they do not
    model_max_length: int
    vocab_size: int
    chat_template: str | None
    added_tokens_decoder: dict[int, AddedTokenInfo]
