"""State that the endpoints share, and the encoding of text and messages before a request is submitted."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.responses import Response

from sgl_jax.engine.service import GenerationService
from sgl_jax.request import InvalidParameter, Json
from sgl_jax.server.error_envelope import unknown_model
from sgl_jax.server.openai_types import Message, TemplateFields
from sgl_jax.text.tokenizer import Tokenizer, TokenizerError

if TYPE_CHECKING:
    from sgl_jax.settings.server_args import ServerArgs

_ENCODE_ELSEWHERE = 20_000  # characters from which on encoding runs in a thread, or it would hold up other requests
_ANY_MODEL = "default"  # a name for any model, which SGLang's clients send


@dataclass
class ServerState:
    service: GenerationService
    server_args: ServerArgs
    started: float = field(default_factory=time.time)

    @property
    def tokenizer(self) -> Tokenizer:
        return self.service.tokenizer

    @property
    def model_name(self) -> str:
        return self.server_args.served_model_name or self.server_args.model_path

    @property
    def tokenizer_path(self) -> str:
        return self.server_args.tokenizer_path or self.server_args.model_path

    def serves(self, name: str) -> bool:
        return name.rstrip("/") == self.model_name.rstrip("/")  # folders are written with a slash behind them, and URLs

    def check_model(self, name: str | None) -> None:
        if name not in (None, _ANY_MODEL) and not self.serves(name):
            raise unknown_model(str(name), self.model_name)

    async def encode(self, text: str, field: str, add_special_tokens: bool = True) -> list[int]:
        try:
            return await encoding(len(text), self.tokenizer.encode, text, add_special_tokens)
        except TokenizerError as error:
            raise InvalidParameter(field, f"{field}: {error}") from error

    async def encode_chat(self, messages: Sequence[Message], options: TemplateFields) -> list[int]:
        """Encode a conversation as the model's template writes it. Templates spell out their special tokens."""
        template = self.tokenizer.chat_template()
        shown = template_messages(messages, knows_developer="developer" in template.source)
        final, prompt = bool(options.continue_final_message), options.add_generation_prompt
        text = template.render(
            shown,
            add_generation_prompt=not final if prompt is None else prompt,
            continue_final_message=final,
            template_kwargs=options.chat_template_kwargs,
        )
        return await self.encode(text, "messages", add_special_tokens=bool(options.add_special_tokens))


async def encoding[**P, R](num_characters: int, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Make a call that encodes so many characters; in a thread if it would hold up other requests."""
    if num_characters >= _ENCODE_ELSEWHERE:
        return await asyncio.to_thread(call, *args, **kwargs)
    return call(*args, **kwargs)


def template_messages(messages: Sequence[Message], knows_developer: bool) -> list[dict[str, Json]]:
    """Convert messages to the form that templates expect: content as one string, tool arguments as objects."""
    found = []
    for i, message in enumerate(messages):
        if message.content is None and not (message.role == "assistant" and message.tool_calls):
            raise InvalidParameter(f"messages[{i}].content", f"messages[{i}].content is missing")
        content = message.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        role = "system" if message.role == "developer" and not knows_developer else message.role
        entry: dict[str, Json] = {"role": role, "content": content or ""}
        for name in ("name", "tool_call_id", "reasoning_content"):
            value = getattr(message, name)
            if value is not None:
                entry[name] = value
        if message.tool_calls:
            entry["tool_calls"] = [_template_call(call.model_dump(exclude_none=True)) for call in message.tool_calls]
        found.append(entry)
    return found


def _template_call(call: dict[str, Any]) -> dict[str, Any]:
    with contextlib.suppress(ValueError, RecursionError):  # not JSON: the template sees the text the client sent
        call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return call


def json_response(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
