"""Renders chat templates: Jinja in a sandbox, with the names and filters that published templates use."""

import contextlib
import datetime
import functools
import json
import uuid
from collections.abc import Iterator, Mapping, Sequence, Set
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

_RESERVED = ("messages", "tools", "documents", "add_generation_prompt")
_NO_FINAL_TEXT = "continue_final_message needs a last message whose text appears in the rendered prompt"


def bundled_templates() -> dict[str, str]:
    """Return the templates that come with us, by the names that --chat-template takes ("chatml")."""
    files = resources.files("sgl_jax.text").joinpath("templates").iterdir()
    return {Path(file.name).stem: file.read_text(encoding="utf-8") for file in files if file.name.endswith(".jinja")}


class TemplateError(ValueError):
    """A template does not compile, refuses the messages, or fails on them."""


class Arguments(dict[str, Any]):
    """Arguments of a tool call, for templates that go through them and for those that take them for text in JSON."""

    def __str__(self) -> str:
        return _tojson(self)

    def __add__(self, other: str) -> str:
        return f"{self}{other}"

    def __radd__(self, other: str) -> str:
        return f"{other}{self}"


class _GenerationTag(jinja2.ext.Extension):
    """Tag `{% generation %}…{% endgeneration %}`, which marks the assistant's text for training. Its body is kept."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes <, > and & for HTML; models were trained on plain JSON.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    names: dict[str, Any] = environment.globals
    names["raise_exception"] = _raise_exception
    names["strftime_now"] = lambda format: datetime.datetime.now().strftime(format)
    return environment


class ChatTemplate:
    """Template, compiled when it is first rendered. `special_tokens` (bos_token, eos_token, …) are visible to it by name."""

    def __init__(self, source: str, special_tokens: Mapping[str, object] | None = None):
        self.source = source
        self.special_tokens = dict(special_tokens or {})

    def check(self) -> None:
        """Read the source without computing anything in it. Raises TemplateError for wrong syntax."""
        with _no_other_errors("the chat template does not compile:"):
            _environment().parse(self.source)

    @functools.cached_property
    def variables(self) -> Set[str]:
        """Names that the template reads and does not define itself."""
        with _no_other_errors("the chat template does not compile:"):
            return jinja2.meta.find_undeclared_variables(_environment().parse(self.source))

    @functools.cached_property
    def _template(self) -> jinja2.Template:
        with _no_other_errors("the chat template does not compile:"):
            return _environment().from_string(self.source)

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, object] | None = None,
    ) -> str:
        """Return the conversation as the model reads it. Raises TemplateError.

        With `continue_final_message` the text ends inside the last message, so that the model goes on with it.
        """
        extra = dict(template_kwargs or {})
        for name in _RESERVED:
            if name in extra:
                raise TemplateError(f"{name} cannot be set through chat_template_kwargs")
        if continue_final_message and add_generation_prompt:
            raise TemplateError("continue_final_message and add_generation_prompt exclude each other")
        names = self.special_tokens | extra
        names |= {"tools": tools, "documents": None, "add_generation_prompt": add_generation_prompt}
        text = self._rendered(messages, names)
        if not continue_final_message:
            return text
        marker = uuid.uuid4().hex
        return _cut_at_marker(text, self._rendered(_marked(messages, marker), names), marker)

    def _rendered(self, messages: Sequence[Mapping[str, object]], names: Mapping[str, object]) -> str:
        template = self._template
        with _no_other_errors("the chat template refuses these messages:"):
            return template.render(messages=messages, **names)


@contextlib.contextmanager
def _no_other_errors(what: str) -> Iterator[None]:
    """Turn whatever Jinja or a template raises, type errors, recursion errors and refusals, into TemplateError."""
    try:
        yield
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(f"{what} line {error.lineno}: {error.message}") from error
    except MemoryError as error:
        raise TemplateError(f"{what} it needs too much memory") from error
    except Exception as error:
        raise TemplateError(f"{what} {error}") from error


def _marked(messages: Sequence[Mapping[str, Any]], marker: str) -> list[Mapping[str, Any]]:
    """Return the messages with the marker at the end of the last one's text."""
    content = messages[-1].get("content") or ""
    if isinstance(content, str):
        text, content = content, content + marker
    else:
        parts = list(content)
        at = next((i for i in reversed(range(len(parts))) if "text" in parts[i]), None)
        text = "" if at is None else parts[at]["text"]
        if at is not None:
            parts[at] = {**parts[at], "text": text + marker}
        content = parts
    if not text.strip():
        raise TemplateError(_NO_FINAL_TEXT)
    return [*messages[:-1], {**messages[-1], "content": content}]


def _cut_at_marker(text: str, marked: str, marker: str) -> str:
    """Return `text` up to where the marker stands in `marked`, which is the same text with the marker in it."""
    end = marked.rfind(marker)
    if end < 0:
        raise TemplateError(_NO_FINAL_TEXT)
    kept = marked[:end]
    return kept if text.startswith(kept) else kept.rstrip()  # a template that trims has dropped the space
