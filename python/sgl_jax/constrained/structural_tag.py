"""Structural tags: free text in which JSON stands between tags, as SGLang and vLLM write them."""

import json
from collections.abc import Iterator

from sgl_jax.constrained.schema import enforced
from sgl_jax.request import Json

_FORM = '{"type": "structural_tag", "structures": [{"begin": TEXT, "schema": SCHEMA, "end": TEXT}], "triggers": [TEXT]}'


def structural_tag_grammar(text: str) -> str:
    """Return a grammar of texts in which each trigger begins one of the structures: its begin, JSON of its schema, and its
    end. Raises ValueError."""
    from llguidance import LLMatcher, StructTag

    given = json.loads(text)
    tags = [
        StructTag(trigger=trigger, begin=begin, grammar=enforced(schema), end=end)
        for trigger, begin, schema, end in _structures(given)
    ]
    return LLMatcher.grammar_from_lark(StructTag.to_grammar(tags, assume_special=False))


def _structures(given: Json) -> Iterator[tuple[str, str, Json, str]]:
    """Yield the trigger, begin, schema and end of each structure."""
    structures, triggers = (given.get("structures"), given.get("triggers")) if isinstance(given, dict) else (None, None)
    if not (isinstance(structures, list) and isinstance(triggers, list) and structures and triggers):
        raise ValueError(f"it must have structures and triggers, as in {_FORM}; other forms are not built")
    for each in structures:
        begin, end = (each.get("begin"), each.get("end")) if isinstance(each, dict) else (None, None)
        if not (isinstance(each, dict) and isinstance(begin, str) and isinstance(end, str) and "schema" in each):
            raise ValueError(
                f"a structure is {json.dumps(each)[:80]}; it must have begin, schema and end, as in {_FORM}"
            )
        found = [trigger for trigger in triggers if isinstance(trigger, str) and trigger and begin.startswith(trigger)]
        if not found:
            raise ValueError(f"a structure begins with {begin!r}; it must begin with one of triggers")
        yield found[0], begin, each["schema"], end
