"""Grammars that a user gives, by kind, as expressions in the library's notation."""

import json

from sgl_jax.constrained.lark import Lark
from sgl_jax.constrained.schema import enforced
from sgl_jax.constrained.structural_tag import structural_tag
from sgl_jax.request import Grammar


def given(lark: Lark, grammar: Grammar) -> str:
    """Return the language of a grammar. Raises ValueError for one that would not be enforced as it is written."""
    from llguidance import grammar_from

    match grammar.kind:
        case "json_schema":
            return lark.schema(enforced(json.loads(grammar.text)))
        case "structural_tag":
            return structural_tag(lark, json.loads(grammar.text))
        case "regex":
            return lark.regex(grammar.text)
        case _:
            return lark.grammar(grammar_from("ebnf", grammar.text))
