"""Grammars in the library's notation: Lark's, with references to tokens, JSON schemas and other grammars."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence

from sgl_jax.constrained.token_tree import TokenTree
from sgl_jax.request import Json

# Otherwise the library tokenises forced text itself, also as added tokens, which it then refuses.
OPTIONS = '%llguidance {"no_forcing": true}'
_ANY = r"(.|\n)*"
_TEXT = f"/{_ANY}/"


class GrammarError(ValueError):
    """A grammar cannot be compiled, or a text does not belong to it."""


class Lark:
    """A grammar while it is written. Methods return an expression, for the body of a rule."""

    def __init__(self, vocabulary: TokenTree):
        self._marks, self._ends = vocabulary.marks, vocabulary.ends
        self._rules: list[str] = []
        self._others: list[dict[str, str]] = []
        by_length = sorted(self._marks, key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, by_length))})") if by_length else None

    def source(self, start: str) -> str:
        """Return the grammar of texts that belong to `start`."""
        rules = [f"start: {start}", *self._rules, OPTIONS]
        return json.dumps({"grammars": [{"lark_grammar": "\n".join(rules)}, *self._others]})

    def rule(self, body: str, options: str = "") -> str:
        name = f"r{len(self._rules)}"
        self._rules.append(f"{name}{options}: {body}")
        return name

    def grammar(self, lark: str) -> str:
        """Return the language of another grammar, whose rules have names of their own."""
        name = f"g{len(self._others)}"
        self._others.append({"name": name, "lark_grammar": f"{lark}\n{OPTIONS}"})
        return f"@{name}"

    def is_token(self, text: str) -> bool:
        return text in self._marks

    def literal(self, text: str) -> str:
        """Return the text. What is a token of its own in it, such as <tool_call>, is that token."""
        parts = self._split.split(text) if self._split else [text]
        found = [f"<[{self._marks[part]}]>" if part in self._marks else json.dumps(part) for part in parts if part]
        return " ".join(found) or '""'

    def choice(self, expressions: Iterable[str]) -> str:
        return self.rule(" | ".join(expressions))

    def repeated(self, expression: str, separator: str, most_one: bool = False) -> str:
        """Return the expression once or more, separated by a literal."""
        if most_one:
            return expression
        item = self.rule(expression)
        return f"{item} ({self.literal(separator) if separator else ''} {item})*"

    def schema(self, schema: Json) -> str:
        """Return JSON of a schema, as `schema.enforced` makes it."""
        return f"%json {json.dumps(schema)}"

    def regex(self, pattern: str) -> str:
        """Return the texts that the whole of a regular expression matches."""
        from llguidance import LLMatcher

        return self.grammar(json.loads(LLMatcher.grammar_from_regex(pattern))["grammars"][0]["lark_grammar"])

    def tokens(self, but: Sequence[str] = (), most: int | None = None) -> str:
        """Return any tokens, at most so many. None of them ends the answer or is one of `but`."""
        if most == 0:
            return ""
        left_out = ",".join(map(str, sorted({*self._ends, *(self._marks[mark] for mark in but)})))
        return f"{self.rule(f'<[^{left_out}]>')}{'*' if most is None else f'{{0,{most}}}'}"

    def text(self, without: Iterable[str] = ()) -> str:
        """Return any text in which none of these stands. No token that has a name of its own is a part of it."""
        return self.rule(self._text(without))

    def text_until(self, mark: str, without: Iterable[str] = ()) -> str:
        """Return any text in which none of `without` stands, and the first `mark` behind it. What the mark has before a
        token is a part of the text."""
        if found := [each for each in self._marks if each in mark]:
            first = min(found, key=mark.find)
            return f"{self.text([*without, first])} {self.literal(mark[mark.find(first) :])}"
        return self.rule(self._text(without), f"[suffix={json.dumps(mark)}]")

    def _text(self, without: Iterable[str]) -> str:
        if not (words := "|".join(map(_escaped, without))):
            return _TEXT
        name = f"T{len(self._rules)}"
        self._rules.append(f"{name}: {_TEXT} & ~/{_ANY}({words}){_ANY}/")
        return name


def _escaped(text: str) -> str:
    return re.escape(text).replace("/", r"\/").replace("\\\n", r"\n")
