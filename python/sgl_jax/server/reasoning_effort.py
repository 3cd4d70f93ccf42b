"""`reasoning_effort` as the variables that a chat template reads."""

from collections.abc import Mapping

from sgl_jax.request import InvalidParameter, Json
from sgl_jax.server.openai_types import TemplateFields
from sgl_jax.text.chat_template import ChatTemplate
from sgl_jax.text.tool_calls.formats import HARMONY, thoughts_in

_SWITCHES = ("enable_thinking", "thinking")
_OF_HARMONY = {"none": "low", "minimal": "low", "xhigh": "high"}  # GPT-OSS knows three efforts, and always thinks


def template_kwargs(options: TemplateFields, template: ChatTemplate) -> Mapping[str, Json]:
    """Return the request's variables for the template; `chat_template_kwargs` win. Raises InvalidParameter for an effort
    that the template does not read."""
    given, effort = options.chat_template_kwargs or {}, options.reasoning_effort
    if effort is None:
        return given
    if thoughts_in(template.source) == HARMONY:
        effort = _OF_HARMONY.get(effort, effort)
    values: dict[str, Json] = {**dict.fromkeys(_SWITCHES, effort != "none"), "reasoning_effort": effort}
    if not (read := values.keys() & template.variables):
        text = f"reasoning_effort is {effort}, but this model's chat template reads none of {', '.join(values)}; leave it out"
        raise InvalidParameter("reasoning_effort", text)
    return {name: values[name] for name in read} | given
