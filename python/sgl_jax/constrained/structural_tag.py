"""Structural tags: text in which JSON and other forms stand between tags, as SGLang, vLLM and XGrammar write them."""

import json
from collections.abc import Callable, Mapping

from sgl_jax.constrained.lark import Lark
from sgl_jax.constrained.schema import enforced
from sgl_jax.request import Json

_OLD = '{"structures": [{"begin": TEXT, "schema": SCHEMA, "end": TEXT}], "triggers": [TEXT]}'
_NEW = '{"format": {"type": TYPE, …}}'

type Form = Mapping[str, Json]
type Writer = Callable[[Lark, Form, str], str]  # is told the text behind the form


def structural_tag(lark: Lark, given: Json) -> str:
    """Return the texts of a structural tag. Raises ValueError for one that it does not know."""
    match given:
        case {"format": dict(form)}:
            return _form(lark, form)
        case {"structures": [*structures], "triggers": [*triggers]} if structures and triggers:
            return _triggered(lark, {"triggers": triggers, "tags": [_as_tag(each) for each in structures]})
    raise ValueError(f"it must have the form {_NEW}, or structures and triggers: {_OLD}")


def _as_tag(structure: Json) -> Json:
    match structure:
        case {"begin": str(begin), "schema": schema, "end": str(end)}:
            return {"begin": begin, "content": {"type": "json_schema", "json_schema": schema}, "end": end}
    raise ValueError(f"a structure is {json.dumps(structure)[:80]}; it must have begin, schema and end, as in {_OLD}")


def _form(lark: Lark, form: Json, end: str = "") -> str:
    """Return the texts of a form, and `end` behind them."""
    if not isinstance(form, dict) or (write := _FORMS.get(str(form.get("type")))) is None:
        raise ValueError(f"a format is {json.dumps(form)[:80]}; its type must be one of {', '.join(_FORMS)}")
    return write(lark, form, end)


def _ended(write: Callable[[Lark, Form], str]) -> Writer:
    """Return a writer of forms whose own end is known, so that `end` may follow."""
    return lambda lark, form, end: f"{write(lark, form)} {lark.literal(end)}" if end else write(lark, form)


def _any_text(lark: Lark, form: Form, end: str) -> str:
    return lark.text_until(end) if end else lark.text()


def _sequence(lark: Lark, form: Form, end: str) -> str:
    *firsts, last = _list(form, "elements")
    if any(isinstance(each, dict) and each.get("type") == "any_text" for each in firsts):
        raise ValueError("any_text must be the last element of a sequence: nothing says where it ends")
    return " ".join([*(_form(lark, each) for each in firsts), _form(lark, last, end)])


def _or(lark: Lark, form: Form, end: str) -> str:
    return lark.choice(_form(lark, each, end) for each in _list(form, "elements"))


def _text(form: Form, key: str) -> str:
    if not isinstance(value := form.get(key), str):
        raise ValueError(f"{form.get('type', 'a tag')} must have {key}, a text; it is {json.dumps(form)[:80]}")
    return value


def _list(form: Form, key: str) -> list[Json]:
    if not (isinstance(value := form.get(key), list) and value):
        raise ValueError(f"{form.get('type', 'a tag')} must have {key}, a list; it is {json.dumps(form)[:80]}")
    return value


def _tag(lark: Lark, tag: Json, skipped: str = "") -> str:
    """Return the texts of a tag, without what its begin has in common with a trigger that stands before it."""
    if not isinstance(tag, dict):
        raise ValueError(f"a tag is {json.dumps(tag)[:80]}; it must have begin, content and end")
    begin = lark.literal(_text(tag, "begin").removeprefix(skipped))
    return f"{begin} {_form(lark, tag.get('content'), _text(tag, 'end'))}"


def _triggered(lark: Lark, form: Form) -> str:
    """Return free text in which each trigger begins a tag."""
    triggers = [each for each in _list(form, "triggers") if isinstance(each, str) and each]
    by_trigger: dict[str, list[Json]] = {}
    for tag in _list(form, "tags"):
        begin = _text(tag, "begin") if isinstance(tag, dict) else ""
        trigger = next((each for each in triggers if begin.startswith(each)), None)
        if trigger is None:
            raise ValueError(f"a tag begins with {begin!r}; it must begin with one of triggers")
        by_trigger.setdefault(trigger, []).append(tag)
    tags = lark.choice(
        f"{lark.text_until(trigger)} {lark.choice(_tag(lark, tag, trigger) for tag in found)}"
        for trigger, found in by_trigger.items()
    )
    if form.get("stop_after_first"):
        return tags if form.get("at_least_one") else lark.choice([tags, lark.text()])
    return f"{tags}{'+' if form.get('at_least_one') else '*'} {lark.text()}"


def _separated(lark: Lark, form: Form) -> str:
    tags = lark.choice(_tag(lark, tag) for tag in _list(form, "tags"))
    found = lark.repeated(tags, _text(form, "separator"), bool(form.get("stop_after_first")))
    return found if form.get("at_least_one") else f"({found})?"


_FORMS: Mapping[str, Writer] = {
    "const_string": _ended(lambda lark, form: lark.literal(_text(form, "value"))),
    "json_schema": _ended(lambda lark, form: lark.schema(enforced(form.get("json_schema")))),
    "any_text": _any_text,
    "regex": _ended(lambda lark, form: lark.regex(_text(form, "pattern"))),
    "grammar": _ended(lambda lark, form: lark.grammar(_text(form, "grammar"))),
    "tag": _ended(_tag),
    "sequence": _sequence,
    "or": _or,
    "triggered_tags": _ended(_triggered),
    "tags_with_separator": _ended(_separated),
}
