"""Requests and answers of Anthropic's Messages API. Unknown fields are refused by name."""

from typing import Annotated, Literal

import msgspec
from pydantic import BeforeValidator, Field

from sgl_jax.server.bodies import Answered, Body, StopString, limited, limits, null_fields, with_fields
from sgl_jax.server.grammar_fields import JsonObject
from sgl_jax.server.openai_types import MOST_THOUGHT_TOKENS, MOST_TOOLS

type CacheControl = Annotated[dict[str, object], BeforeValidator(limited)] | None  # prefixes are cached in any case


class TextBlock(Answered):
    type: Literal["text"]
    text: str
    cache_control: CacheControl = None


class ThinkingBlock(Answered):
    type: Literal["thinking"]
    thinking: str
    signature: str | None = None
    cache_control: CacheControl = None


class RedactedThinkingBlock(Answered):
    """A thought that only its maker can read. It is left out."""

    type: Literal["redacted_thinking"]
    data: str
    cache_control: CacheControl = None


class ToolUseBlock(Answered):
    type: Literal["tool_use"]
    id: str
    name: str
    input: JsonObject
    cache_control: CacheControl = None
    caller: object = None


class ToolResultBlock(Answered):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[TextBlock] | None = None
    is_error: bool | None = None
    cache_control: CacheControl = None


Block = Annotated[
    TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")
]


class MessageTurn(Body):
    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class MessagesTool(Body):
    type: Literal["custom"] | None = None
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.:/-]{1,256}$")]
    description: str | None = None
    input_schema: JsonObject
    strict: bool | None = None
    cache_control: CacheControl = None
    eager_input_streaming: bool | None = None
    input_examples: list[JsonObject] | None = None
    defer_loading: Literal[False] | None = None
    allowed_callers: list[Literal["direct"]] | None = None


class MessagesToolChoice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Body):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Field(ge=0, le=MOST_THOUGHT_TOKENS)] | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(Body):
    type: Literal["json_schema"]
    schema_: JsonObject = Field(alias="schema")


class OutputConfig(Body):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class ContextManagement(Body):
    """Edits that leave out parts of old turns. Nothing is left out: they only save prompt tokens."""

    edits: list[JsonObject] | None = None


@with_fields(null_fields("container diagnostics fallbacks mcp_servers inference_geo speed"))
class CountTokensRequest(Body):
    model: str
    messages: Annotated[list[MessageTurn], Field(min_length=1)]
    system: str | list[TextBlock] | None = None
    tools: Annotated[list[MessagesTool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: MessagesToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = Field(None, description="another name for output_config.format")
    cache_control: CacheControl = None
    context_management: ContextManagement | None = None
    thread: JsonObject | None = Field(None, description="refused, as the library knows how to be: there are no threads")


class MessagesRequest(CountTokensRequest):
    max_tokens: Annotated[int, limits("max_tokens", low=1)]
    stream: bool | None = None
    stop_sequences: list[StopString] | None = None
    temperature: Annotated[float, limits("temperature")] | None = None
    top_p: Annotated[float, limits("top_p")] | None = None
    top_k: Annotated[int, limits("top_k")] | None = None
    priority: Annotated[int, limits("priority")] | None = Field(None, description="as in chats; Anthropic has none")
    # accepted, but without effect on the answer
    metadata: Annotated[dict[str, object], BeforeValidator(limited)] | None = None
    service_tier: Literal["auto", "standard_only"] | None = None


type StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class MessagesUsage(msgspec.Struct):
    """Counts of tokens. Those of the prompt that were cached are apart from the others."""

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int = 0
    cache_creation_input_tokens: int = 0


class AnsweredText(msgspec.Struct, tag="text"):
    text: str = ""


class AnsweredThinking(msgspec.Struct, tag="thinking"):
    thinking: str = ""
    signature: str = ""


class AnsweredToolUse(msgspec.Struct, tag="tool_use"):
    id: str
    name: str
    input: JsonObject


type AnsweredBlock = AnsweredText | AnsweredThinking | AnsweredToolUse


class AnsweredMessage(msgspec.Struct):
    id: str
    model: str
    content: list[AnsweredBlock]
    usage: MessagesUsage
    stop_reason: StopReason | None = None
    stop_sequence: str | None = None
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"


class TokenCount(msgspec.Struct):
    input_tokens: int
