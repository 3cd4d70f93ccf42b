"""Compiled grammars, over the library llguidance.

The library raises no errors: a matcher that meets one allows the end of the text and nothing else from then on. So each
call here looks for an error and raises it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from sgl_jax.constrained.answer_grammar import answer_grammar
from sgl_jax.constrained.grammar_kinds import given
from sgl_jax.constrained.lark import OPTIONS, GrammarError, Lark
from sgl_jax.constrained.token_tree import TokenTree
from sgl_jax.request import Grammar
from sgl_jax.text.tool_calls.answer_form import AnswerForm

if TYPE_CHECKING:
    from llguidance import LLMatcher

_OF_SCHEMA = "failed to compile JSON schema: "
_STOPPED = {
    "NoExtension": "no text belongs to it",
    "ParserTooComplex": "it is too complex",
    "LexerTooComplex": "it is too complex",
}


class LibraryMatcher:
    """Place in a text that grows, token by token, by its grammar."""

    def __init__(self, matcher: LLMatcher):
        self._matcher = matcher

    def advance(self, tokens: Sequence[int]) -> None:
        """Move over the tokens. Raises GrammarError if the grammar does not allow them, or has become too complex."""
        self._matcher.consume_tokens([*tokens])
        _check(self._matcher)

    def mask(self) -> np.ndarray:
        """Return a mask with bit i % 32 of word i // 32 set where token i may come next, i32. A token that ends an answer may
        exactly where the text may end. Raises GrammarError."""
        words = np.frombuffer(self._matcher.compute_bitmask(), np.int32)
        _check(self._matcher)
        return words


class LibraryGrammar:
    def __init__(self, matcher: LLMatcher):
        self._matcher = matcher

    def matcher(self) -> LibraryMatcher:
        """Return a matcher at the start of a text."""
        return LibraryMatcher(self._matcher.deep_copy())


def compile_grammar(vocabulary: TokenTree, grammar: Grammar) -> LibraryGrammar:
    """Compile a grammar and its first mask. The library bounds the effort. Raises GrammarError with the reason, such as a
    keyword that it does not enforce."""
    from llguidance import LLMatcher, LLParserLimits

    lark = Lark(vocabulary)
    try:
        is_form = grammar.kind == "answer_form"
        source = lark.source(answer_grammar(lark, AnswerForm.read(grammar.text)) if is_form else given(lark, grammar))
    except (ValueError, RecursionError) as error:
        raise GrammarError(_readable(str(error))) from error
    matcher = LLMatcher(vocabulary.tree, source, log_level=0, limits=LLParserLimits(verbose_errors=False))
    _check(matcher)
    matcher.compute_bitmask()  # which an endless $ref fails, and which is slow for a large grammar
    _check(matcher)
    return LibraryGrammar(matcher)


def _check(matcher: LLMatcher) -> None:
    if matcher.is_error():
        raise GrammarError(_readable(matcher.get_error()))


def _readable(message: str) -> str:
    """Return a message of the library in one line of bounded length, without the grammar that was made of a schema."""
    message = message.removesuffix("<non-verbose/>")
    if _OF_SCHEMA in message:
        message = message.partition(_OF_SCHEMA)[2].partition("\n")[0]
    text = " ".join(re.sub(rf"\n.*\| {re.escape(OPTIONS)}\n?", "", message).split())
    return next((said for sign, said in _STOPPED.items() if text.startswith(sign)), text)[:500]
