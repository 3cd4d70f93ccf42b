"""Requests of the OpenAI endpoints. Unknown fields, and known ones that are not supported, are refused by name."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from sgl_jax.request import InvalidParameter
from sgl_jax.server.bodies import (
    INT64_MAX,
    Body,
    CacheKey,
    EmptyList,
    TokenId,
    limited,
    limits,
    null_fields,
    off_fields,
    sampling_fields,
    with_fields,
)
from sgl_jax.server.grammar_fields import GrammarFields

MOST_TOOLS = 2048
MOST_THOUGHT_TOKENS = 2**31 - 1


class StreamOptions(Body):
    include_usage: bool | None = Field(None, description="a last chunk has the usage of the whole request")
    continuous_usage_stats: bool | None = Field(None, description="every chunk has the usage of the request so far")
    include_obfuscation: bool | None = Field(None, description="chunks are padded, so that their size tells no length")


@with_fields(sampling_fields("openai"))
class SamplingFields(GrammarFields):
    """Fields that chat and completion requests share."""

    model: str | None = Field(None, description="the served model, an adapter, or MODEL:ADAPTER; may be left out")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    rid: Annotated[str, Field(min_length=1)] | None = Field(None, description="a name for /abort_request")
    cache_salt: CacheKey | None = Field(None, description="requests share cached prefixes only within one salt")
    # accepted, but without effect on the answer
    user: str | None = None
    metadata: Annotated[dict[str, str], BeforeValidator(limited)] | None = None
    store: bool | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None

    def check_stream_options(self) -> None:
        """Check that options of a stream come with one. Raises InvalidParameter."""
        if self.stream_options is not None and not self.stream:
            raise InvalidParameter("stream_options", "stream_options needs stream")


class TextPart(Body):
    type: Literal["text"]
    text: str


class FunctionCall(Body):
    name: str
    arguments: object = Field(None, description="a JSON object as text, or the object; anything else counts as {}")


class ToolCall(Body):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


@with_fields(off_fields("Message"))
class Message(Body):
    """Turn of a conversation. The model's template decides how it shows earlier tool calls and their results."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = Field(None, description="another name for reasoning_content")
    refusal: str | None = None
    annotations: EmptyList | None = None


class Function(Body):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.:/-]{1,256}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="a JSON schema of the arguments")
    strict: bool | None = Field(None, description="true: a call's arguments follow parameters")


class FunctionTool(Body):
    type: Literal["function"]
    function: Function


class FunctionName(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: FunctionName


class AllowedTools(Body):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MOST_TOOLS)]


class AllowedToolsChoice(Body):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolChoice = Annotated[NamedTool | AllowedToolsChoice, Field(discriminator="type")]


class TemplateFields(Body):
    tools: Annotated[list[FunctionTool], Field(max_length=MOST_TOOLS)] | None = Field(
        None, description="what the model may call"
    )
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = Field(None, description="the answer goes on with the last message")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="variables for the chat template")
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = Field(
        None, description="the template's variable for it; where that is a switch none is off"
    )
    add_special_tokens: bool | None = Field(None, description="the template's text gets BOS too; false if not set")


@with_fields(
    off_fields("ChatCompletionRequest"),
    null_fields("moderation prediction prompt_cache_options verbosity"),
)
class ChatCompletionRequest(SamplingFields, TemplateFields):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, limits("max_tokens", low=1)] | None = None
    max_tokens: Annotated[int, limits("max_tokens", low=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, limits("logprobs")] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = Field(
        None, description="none hides the tools from the model; required, or a named tool, forces a call"
    )
    parallel_tool_calls: bool | None = Field(None, description="false: of several calls only the first is answered")
    separate_reasoning: bool | None = Field(None, description="false: thoughts stay in the content")
    stream_reasoning: bool | None = Field(None, description="false: a stream has a thought in one piece, at its end")
    include_reasoning: bool | None = Field(None, description="false: thoughts are left out")
    thinking_token_budget: Annotated[int, Field(ge=0, le=MOST_THOUGHT_TOKENS)] | None = Field(
        None, description="the thought has at most so many tokens"
    )


@with_fields(off_fields("CompletionRequest"), null_fields("suffix"))
class CompletionRequest(SamplingFields):
    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    max_tokens: Annotated[int, limits("max_tokens", low=0)] | None = Field(
        None, description="16, or what fits, if not set"
    )
    add_special_tokens: bool | None = Field(None, description="text prompts get BOS; true if not set")
    echo: bool | None = None
    logprobs: Annotated[int, limits("logprobs")] | None = None
    best_of: Annotated[int, Field(ge=1, le=INT64_MAX)] | None = Field(None, description="refused unless it equals n")


class TokenizeRequest(TemplateFields):
    """Either `prompt`, with special tokens unless `add_special_tokens` is false, or `messages`, with them if it is true."""

    model: str | None = None
    prompt: str | list[str] | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    return_token_strs: bool | None = Field(None, description="the answer has each token's text too")


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: list[TokenId] | list[list[TokenId]]
    skip_special_tokens: bool | None = None
