"""Messages in the form that a chat template reads: templates differ in how they take tools, calls, results and thoughts."""

import itertools
import json
from collections.abc import Callable, Iterator, Sequence

from sgl_jax.request import InvalidParameter, Json
from sgl_jax.server.openai_types import FunctionTool, Message, ToolCall

type Entry = dict[str, Json]

_ABOUT_TOOLS = "You can call these functions:\n{tools}\nTo call one, {how}. Its result comes in the next message."
_AS_JSON = 'answer with nothing but a JSON object: {"name": its name, "parameters": an object with its arguments}'
_AS_DEEPSEEK = (
    "write <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{call}<｜tool▁call▁end｜><｜tool▁calls▁end｜>, "
    "with the arguments as a JSON object"
)


def template_messages(messages: Sequence[Message], template: str) -> list[Entry]:
    """Convert messages to the form that the template (its source) expects: content as one string, arguments as objects.
    Raises InvalidParameter."""
    entries = []
    for i, message in enumerate(messages):
        if message.content is None and not (message.role == "assistant" and message.tool_calls):
            raise InvalidParameter(f"messages[{i}].content", f"messages[{i}].content is missing")
        entries.append(_entry(message, template))
    if "<|tool_call_begin|>" in template:
        _rename(entries, lambda name, i: f"functions.{name}:{i}")
    elif "length != 9" in template:
        _rename(entries, lambda name, i: f"{i:09}")
    return list(_one_call_each(entries)) if "single tool-call" in template else entries


def template_tools(tools: Sequence[FunctionTool]) -> list[Entry]:
    found = [tool.model_dump(exclude_none=True) for tool in tools]
    for tool in found:
        tool["function"].setdefault("parameters", {"type": "object", "properties": {}})
    return found


def with_tools_as_text(messages: Sequence[Entry], tools: Sequence[Json], template: str) -> list[Entry]:
    """Return the messages for a template that has no place for tools: they stand in the system message, or before the
    user's where there may be none. If it has none for calls and results either, these become text, too."""
    has_calls = "<｜tool▁call▁begin｜>" in template
    call = (
        "function<｜tool▁sep｜>NAME\n```json\nARGUMENTS\n```"
        if "```json" in template
        else "NAME<｜tool▁sep｜>ARGUMENTS"
    )
    how = _AS_DEEPSEEK.format(call=call) if has_calls else _AS_JSON
    about = _ABOUT_TOOLS.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools), how=how)
    found: list[Entry] = [{"role": "user" if "System role not supported" in template else "system", "content": about}]
    for entry in messages if has_calls else map(_as_text, messages):
        if entry["role"] == found[-1]["role"] and entry["role"] in ("system", "user"):
            found[-1]["content"] = f"{found[-1]['content']}\n\n{entry['content']}"
        else:
            found.append(entry)
    return found


def _as_text(entry: Entry) -> Entry:
    role, content = entry["role"], entry["content"]
    if role == "tool":
        return {"role": "user", "content": f"Result: {content}"}
    calls = [_call_as_text(call) for call in _calls(entry)]
    return {"role": role, "content": "\n".join([*([str(content)] if content else []), *calls])}


def _call_as_text(call: Entry) -> str:
    function = call["function"]
    assert isinstance(function, dict)
    return json.dumps({"name": function["name"], "parameters": function["arguments"]}, ensure_ascii=False)


def _entry(message: Message, template: str) -> Entry:
    content = message.content or ""
    if isinstance(content, list):
        content = "".join(part.text for part in content)
    role = "system" if message.role == "developer" and "developer" not in template else message.role
    entry: Entry = {"role": role, "content": content}
    for name in ("name", "tool_call_id"):
        if (value := getattr(message, name)) is not None:
            entry[name] = value
    if message.tool_calls:
        entry["tool_calls"] = [_call(call) for call in message.tool_calls]
    thought = message.reasoning_content if message.reasoning_content is not None else message.reasoning
    if message.tool_calls and content and "content and thinking" in template:  # GPT-OSS takes only one of the two
        thought, entry["content"] = "\n".join(filter(None, (thought or "", content))), ""
    if thought is not None:
        entry |= dict.fromkeys(("reasoning_content", "reasoning", "thinking"), thought)
    return entry


def _call(call: ToolCall) -> Entry:
    found = call.model_dump(exclude_none=True)
    found["function"]["arguments"] = _object(found["function"].get("arguments"))
    return found


def _object(arguments: object) -> dict[str, Json]:
    """Return a call's arguments as an object, however an earlier answer spelled them. Cut or other text, which a client
    cannot mend, counts as no arguments."""
    for _ in range(2):  # some clients encode them twice
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                return {}
    return arguments if isinstance(arguments, dict) else {}


def _calls(entry: Entry) -> Iterator[Entry]:
    calls = entry.get("tool_calls")
    yield from (call for call in (calls if isinstance(calls, list) else ()) if isinstance(call, dict))


def _results(entries: Sequence[Entry], i: int) -> list[int | None]:
    """Return where the result of each call of message i is: by its id, or else by order, before the next answer."""
    behind = itertools.takewhile(lambda j: entries[j]["role"] != "assistant", range(i + 1, len(entries)))
    left = [j for j in behind if entries[j]["role"] == "tool"]
    calls = list(_calls(entries[i]))
    found: list[int | None] = [None] * len(calls)
    for by_id in (True, False):
        for k, call in enumerate(calls):
            fitting = (j for j in left if not by_id or call.get("id") == entries[j].get("tool_call_id") is not None)
            if found[k] is None and (result := next(fitting, None)) is not None:
                found[k] = result
                left.remove(result)
    return found


def _rename(entries: Sequence[Entry], named: Callable[[str, int], str]) -> None:
    """Give calls, and their results, the ids that the model was trained on."""
    numbers = itertools.count()
    for i, entry in enumerate(entries):
        for call, result in zip(_calls(entry), _results(entries, i), strict=True):
            function = call["function"]
            assert isinstance(function, dict)
            call["id"] = named(str(function["name"]), next(numbers))
            if result is not None:
                entries[result]["tool_call_id"] = call["id"]


def _one_call_each(entries: Sequence[Entry]) -> Iterator[Entry]:
    """Yield an assistant's message with several calls as one message for each, with its result behind it."""
    moved: set[int] = set()
    for i, entry in enumerate(entries):
        calls = list(_calls(entry))
        if len(calls) < 2:
            if i not in moved:
                yield entry
            continue
        for k, (call, result) in enumerate(zip(calls, _results(entries, i), strict=True)):
            yield {**entry, "tool_calls": [call], "content": entry["content"] if k == 0 else ""}
            if result is not None:
                moved.add(result)
                yield entries[result]
