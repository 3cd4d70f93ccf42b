"""The functions that an answer may call, by a chat's `tools` and `tool_choice`."""

from collections.abc import Sequence
from typing import NamedTuple

from sgl_jax.request import InvalidParameter
from sgl_jax.server.openai_types import AllowedToolsChoice, ChatCompletionRequest, FunctionTool, NamedTool


class Callables(NamedTuple):
    shown: Sequence[FunctionTool] = ()  # to the model
    allowed: Sequence[FunctionTool] = ()
    must_call: bool = False

    @property
    def restricted(self) -> bool:
        return len(self.allowed) < len(self.shown)

    def without_others(self) -> "Callables":
        return self._replace(shown=self.allowed)


def callables(body: ChatCompletionRequest) -> Callables:
    """Read the fields. Raises InvalidParameter for a choice without tools, and for one of an unknown function."""
    tools, choice = body.tools or (), body.tool_choice
    match choice:
        case "none":
            return Callables()
        case None | "auto":
            return Callables(tools, tools)
        case "required":
            names, must_call = [tool.function.name for tool in tools], True
        case NamedTool(function=function):
            names, must_call = [function.name], True
        case AllowedToolsChoice(allowed_tools=some):
            names, must_call = [tool.function.name for tool in some.tools], some.mode == "required"
    if not tools:
        raise InvalidParameter("tool_choice", "tool_choice asks for a call, but there are no tools; give tools")
    known = dict.fromkeys(tool.function.name for tool in tools)
    if unknown := [name for name in names if name not in known]:
        listed = ", ".join([*known][:20])
        raise InvalidParameter("tool_choice", f"tool_choice names {unknown[0]}, which is not among the tools: {listed}")
    chosen = {*names}
    return Callables(tools, [tool for tool in tools if tool.function.name in chosen], must_call)
