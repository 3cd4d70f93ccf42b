"""Calls as a list in Python: [get_weather(city="Paris"), get_time()]. Arguments are literals; nothing is evaluated."""

import ast
import json

from sgl_jax.text.tool_calls import json_calls
from sgl_jax.text.tool_calls.pieces import PYTHON, Waiting
from sgl_jax.text.tool_calls.reading import Reading, is_name


def python_list(reading: Reading, opener: str) -> Waiting[None]:
    """Read a list at the beginning of a line. It consists of calls, or is content as a whole. Llama 4 also writes JSON."""
    source, answer = reading.source, reading.answer
    if opener == "{" or (opener != "[" and (yield from source.skip_space()) == "{"):
        yield from json_calls.bare(reading, opener)
        return
    if opener == "[" and not answer.at_line_start:
        return
    if opener != "[" and not (yield from source.take(("[",))):
        return
    calls: list[tuple[str, str]] = []
    while not (yield from source.take(("]",))):
        yield from source.skip_space()
        name, word = yield from source.header(("(", "]", "\n"))
        if word != "(" or not is_name(name.strip()):
            return
        source.back(word)
        parts: list[str] = []
        whole = yield from source.nested(parts.append, PYTHON)
        arguments = _as_json("".join(parts)) if whole else None
        if arguments is None:
            return
        calls.append((name.strip(), arguments))
        yield from source.take((",",))
    for name, arguments in calls:
        answer.call(name)
        answer.arguments(arguments)
        answer.end_call(whole=True)


def _as_json(arguments: str) -> str | None:
    """Return keyword arguments in parentheses as a JSON object. None: they are something else."""
    try:
        call = ast.parse(f"f{arguments}", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            return None
        values = {each.arg: ast.literal_eval(each.value) for each in call.keywords}
        return None if None in values else json.dumps(values, allow_nan=False)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None
