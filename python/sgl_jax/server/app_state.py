"""State that the endpoints share, and the encoding of text and messages before a request is submitted."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import msgspec
from starlette.responses import Response

from sgl_jax.engine.checks import encoded
from sgl_jax.engine.encoding import check_task
from sgl_jax.engine.service import GenerationService
from sgl_jax.server.answer_formats import ChatFormats, chat_formats
from sgl_jax.server.bodies import Body
from sgl_jax.server.chat_history import template_messages, template_tools, with_tools_as_text
from sgl_jax.server.error_envelope import unknown_model
from sgl_jax.server.openai_types import FunctionTool, Message, TemplateFields
from sgl_jax.server.reasoning_effort import template_kwargs
from sgl_jax.settings.adapter_paths import ANY_MODEL
from sgl_jax.settings.server_args import ServerArgs
from sgl_jax.text.chat_template import ChatTemplate
from sgl_jax.text.template_process import TemplateProcess
from sgl_jax.text.tokenizer import Tokenizer
from sgl_jax.text.tool_calls.formats import takes_tools

_AT_ONCE = 4_000  # characters or tokens; the work on more of them, 1 ms and longer, runs in a thread


@dataclass
class ServerState:
    service: GenerationService
    server_args: ServerArgs
    started: float = field(default_factory=time.time)
    responses: Counter[int] = field(default_factory=Counter)  # by status, without those to probes and for pages
    _templates: TemplateProcess = field(default_factory=TemplateProcess)
    _rendering: Executor = field(default_factory=lambda: ThreadPoolExecutor(1, "sgl-jax-template"))
    _text_work: Executor = field(default_factory=lambda: ThreadPoolExecutor(2, "sgl-jax-text"))

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

    def adapter_of(self, model: str | None) -> str | None:
        """Return the adapter that a request's `model` names, also behind the served model and a colon; None: it names
        the served model itself. Raises ApiError for an unknown name."""
        if model in (None, ANY_MODEL) or self.serves(model):
            return None
        adapters = self.service.adapters
        for prefix in ("", f"{self.model_name}:", f"{ANY_MODEL}:"):
            if model.startswith(prefix) and adapters.knows(name := model.removeprefix(prefix)):
                return name
        raise unknown_model(model, self.model_name, adapters)

    def check_generates(self) -> None:
        """Raise InvalidParameter if the launch makes vectors, before its lack of a template is blamed."""
        if self.service.info.pooling is not None:
            self.service.check_ready()
            check_task(self.service.info, pools=False)

    async def encode(self, text: str, field: str, add_special_tokens: bool = True, limit: int = 0) -> list[int]:
        """Encode a text that came in the body's `field`, of plainly no more tokens than the context or `limit` has.
        Raises InvalidParameter."""
        most = max(self.service.info.context_length, limit)
        return await self.text_work(len(text), lambda: encoded(self.tokenizer, text, field, most, add_special_tokens))

    async def text_work[T](self, size: int, work: Callable[[], T]) -> T:
        """Do work on `size` characters or tokens, elsewhere if it would hold up other requests."""
        return await asyncio.get_running_loop().run_in_executor(self._text_work, work) if size > _AT_ONCE else work()

    async def encode_chat(self, messages: Sequence[Message], options: TemplateFields, limit: int = 0) -> list[int]:
        """Encode a conversation as the model's template writes it."""
        text = await self.render_chat(messages, options, options.tools or (), limit)
        return await self.encode(text, "messages", bool(options.add_special_tokens), limit)

    async def render_chat(
        self, messages: Sequence[Message], options: TemplateFields, tools: Sequence[FunctionTool], limit: int = 0
    ) -> str:
        """Return a conversation as the model's template writes it. Templates spell out their special tokens."""
        template = self.chat_template(tools)
        most = self.tokenizer.most_characters(max(self.service.info.context_length, limit))
        final, prompt = bool(options.continue_final_message), options.add_generation_prompt
        variables = template_kwargs(options, template)

        def render() -> str:
            entries, shown = template_messages(messages, template.source), template_tools(tools)
            if tools and not takes_tools(template.source):
                entries, shown = with_tools_as_text(entries, shown, template.source), []
            return self._templates.render(
                template,
                most + 1,  # which is too long, as `encode` will say
                messages=entries,
                tools=shown or None,
                add_generation_prompt=not final if prompt is None else prompt,
                continue_final_message=final,
                template_kwargs=variables,
            )

        return await asyncio.get_running_loop().run_in_executor(self._rendering, render)

    async def render_roles(self, messages: Sequence[tuple[str, str]]) -> str:
        """Return texts as the model's template writes them, whose roles need not be those of a chat."""
        template, most = self.chat_template(()), self.tokenizer.most_characters(self.service.info.context_length)
        entries = [{"role": role, "content": content} for role, content in messages]
        render = partial(self._templates.render, template, most + 1, messages=entries)
        return await asyncio.get_running_loop().run_in_executor(self._rendering, render)

    def chat_formats(self, tools: Sequence[Body]) -> ChatFormats:
        """Return the formats in which the model answers a chat with these tools."""
        return chat_formats(self.server_args, self.chat_template(tools).source, self.tokenizer)

    def chat_template(self, tools: Sequence[Body]) -> ChatTemplate:
        return self.tokenizer.chat_template("tool_use" if tools else "default")


def json_response(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
