"""Requests of OpenAI's Responses API. Unknown fields, and known ones that are not supported, are refused by name."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from sgl_jax.server.bodies import Answered, Body, EmptyList, TextFormat, limited, limits, null_fields, with_fields
from sgl_jax.server.grammar_fields import JsonObject, JsonObjectFormat
from sgl_jax.server.openai_types import MOST_TOOLS

type Status = Literal["in_progress", "completed", "incomplete"]


class ContentText(Answered):
    """A part of a message's text. Those of answers have more fields, which mean nothing in an input."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[JsonObject] | None = None
    logprobs: list[JsonObject] | None = None


class InputMessage(Answered):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[ContentText]
    id: str | None = None
    status: Status | None = None
    phase: Literal["commentary", "final_answer"] | None = None


class CallItem(Answered):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: Status | None = None


class CallOutputItem(Answered):
    type: Literal["function_call_output"]
    call_id: str
    output: str | list[ContentText]
    id: str | None = None
    status: Status | None = None


class ReasoningText(Answered):
    type: Literal["reasoning_text", "summary_text", "text"]
    text: str


class ReasoningItem(Answered):
    type: Literal["reasoning"]
    id: str | None = None
    summary: list[ReasoningText] | None = None
    content: list[ReasoningText] | None = None
    encrypted_content: str | None = None
    status: Status | None = None


class ItemReference(Answered):
    """An item of a stored response."""

    type: Literal["item_reference"]
    id: str


def _kind(item: object) -> str:
    """Return which item this is: one without a type is a message."""
    found = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", "message")
    return found if isinstance(found, str) else ""


type ConversationItem = InputMessage | CallItem | CallOutputItem | ReasoningItem
InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[CallOutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")]
    | Annotated[ItemReference, Tag("item_reference")],
    Discriminator(_kind, custom_error_type="item", custom_error_message="an item of this type is not supported"),
]


class ResponseTool(Body):
    type: Literal["function"]
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.:/-]{1,256}$")]
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None
    defer_loading: Literal[False] | None = None


class NamedFunction(Body):
    type: Literal["function"]
    name: str


class AllowedFunctions(Body):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedFunction], Field(min_length=1, max_length=MOST_TOOLS)]


class SchemaFormat(Body):
    type: Literal["json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: JsonObject = Field(alias="schema")
    strict: bool | None = None


class TextOptions(Body):
    format: Annotated[TextFormat | JsonObjectFormat | SchemaFormat, Field(discriminator="type")] | None = None
    verbosity: Literal["medium"] | None = None


class Reasoning(Body):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = Field(None, description="thoughts are given as they are")
    generate_summary: None = None


class ResponseStreamOptions(Body):
    include_obfuscation: bool | None = Field(None, description="nothing is padded")


@with_fields(null_fields("conversation prompt context_management moderation max_tool_calls top_logprobs"))
class ResponsesRequest(Body):
    input: str | list[InputItem]
    model: str | None = None
    instructions: str | None = Field(None, description="a system message, for this response alone")
    previous_response_id: str | None = Field(None, description="a stored response, whose conversation goes on")
    max_output_tokens: Annotated[int, limits("max_tokens", low=1)] | None = None
    temperature: Annotated[float, limits("temperature")] | None = None
    top_p: Annotated[float, limits("top_p")] | None = None
    priority: Annotated[int, limits("priority")] | None = Field(None, description="as in chats; OpenAI has none")
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    store: bool | None = Field(None, description="false: the response cannot be retrieved or gone on from")
    tools: Annotated[list[ResponseTool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: (
        Literal["none", "auto", "required"]
        | Annotated[NamedFunction | AllowedFunctions, Field(discriminator="type")]
        | None
    ) = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    include: EmptyList | list[Literal["reasoning.encrypted_content"]] | None = None
    # accepted, but without effect on the answer
    client_metadata: Annotated[dict[str, object], BeforeValidator(limited)] | None = None
    access_programs: object = None
    metadata: Annotated[dict[str, str], BeforeValidator(limited)] | None = None
    user: str | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None
