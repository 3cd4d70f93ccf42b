"""Requests of the OpenAI endpoints. An unknown field is refused by name; so is a known one that is not built yet.

Fields of type None are OpenAI's but not supported here: any value but null is refused. Fields under "harmless" are
taken and have no effect on what is generated.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from sgl_jax.request import MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_STOP_TOKENS

_INT64_MAX = 2**63 - 1

Probability = Annotated[float, Field(gt=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
TokenId = Annotated[int, Field(ge=0, le=_INT64_MAX)]
TokenIdText = Annotated[str, Field(pattern="^[0-9]{1,10}$")]
StopString = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1, le=_INT64_MAX)]
CacheKey = Annotated[str, Field(max_length=1024)]
EmptyList = Annotated[list[Any], Field(max_length=0)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class SamplingFields(Body):
    """What chat and completion requests share."""

    model: str | None = Field(None, description="the served model's name; may be left out")
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Field(ge=-1, le=_INT64_MAX)] | None = Field(None, description="-1 or 0: off")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    logit_bias: (
        Annotated[dict[TokenIdText, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MAX_LOGIT_BIAS)] | None
    ) = Field(None, description="by token id")
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: StopString | list[StopString] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKENS)] | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0, le=_INT64_MAX)] | None = None
    skip_special_tokens: bool | None = None
    no_stop_trim: bool | None = Field(None, description="keep the stop string in the text")
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    rid: Annotated[str, Field(min_length=1)] | None = Field(None, description="a name for /abort_request")
    cache_salt: CacheKey | None = Field(None, description="requests share cached prefixes only within one salt")
    # harmless
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None


class TextFormat(Body):
    type: Literal["text"]


class TextPart(Body):
    type: Literal["text"]
    text: str


class FunctionCall(Body):
    name: str
    arguments: str


class ToolCall(Body):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class Message(Body):
    """A turn of the conversation. Earlier tool calls and their results are shown to the model as its template says."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    annotations: EmptyList | None = None
    audio: None = None
    function_call: None = None


class TemplateFields(Body):
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = Field(None, description="the answer goes on with the last message")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="variables for the chat template")


class ChatCompletionRequest(SamplingFields, TemplateFields):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    max_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: EmptyList | None = None
    tool_choice: Literal["none"] | None = None
    parallel_tool_calls: bool | None = Field(None, description="without tools there is nothing to call")
    functions: EmptyList | None = None
    function_call: Literal["none"] | None = None
    response_format: TextFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    audio: None = None
    prediction: None = None
    reasoning_effort: None = None
    verbosity: None = None
    web_search_options: None = None


class CompletionRequest(SamplingFields):
    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    max_tokens: Annotated[int, Field(ge=0, le=_INT64_MAX)] | None = Field(None, description="16 if not set")
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: Count | None = Field(None, description="refused unless it equals n")
    suffix: None = None
    response_format: TextFormat | None = None


class TokenizeRequest(TemplateFields):
    """Either `prompt` or `messages`."""

    model: str | None = None
    prompt: str | list[str] | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: list[TokenId] | list[list[TokenId]]
    skip_special_tokens: bool | None = None
