"""Masks of compiled grammars: the texts that they allow, token by token, and what cannot be compiled."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from llguidance import LLTokenizer

from sgl_jax.constrained.grammar import GrammarError, LibraryGrammar, compile_grammar
from sgl_jax.constrained.token_tree import TokenTree, token_tree
from sgl_jax.request import Grammar
from sgl_jax.text.tokenizer import Tokenizer, load_tokenizer

CASES = Path(__file__).parents[1] / "data" / "schema_cases"
EOS = 2


def cases(name: str) -> list[dict]:
    return json.loads((CASES / f"{name}.json").read_text(encoding="utf-8"))["cases"]


@pytest.fixture(scope="module")
def tokenizer(stories260k: Path) -> Tokenizer:
    return load_tokenizer(str(stories260k))


@pytest.fixture(scope="module")
def vocabulary(tokenizer: Tokenizer) -> TokenTree:
    return token_tree(tokenizer, 512, [EOS])


@pytest.fixture(scope="module")
def tree(vocabulary: TokenTree) -> LLTokenizer:
    return vocabulary.tree


@pytest.fixture(scope="module")
def compiled(vocabulary: TokenTree):
    def compile_it(kind: str, source: object) -> LibraryGrammar:
        text = source if isinstance(source, str) and kind != "json_schema" else json.dumps(source)
        return compile_grammar(vocabulary, Grammar(kind, text))

    return compile_it


def allows(grammar: LibraryGrammar, tree: LLTokenizer, text: str) -> bool:
    """Whether each token of the text is allowed in its place, and the end behind it."""
    matcher = grammar.matcher()
    for token in [*tree.tokenize_str(text), EOS]:
        if not matcher.mask()[token // 32] >> (token % 32) & 1:
            return False
        if token != EOS:
            matcher.advance([token])
    return True


def source_of(case: dict) -> tuple[str, object]:
    if "schema" in case:
        return "json_schema", case["schema"]
    if case["kind"] == "choice":
        return "ebnf", "start: " + " | ".join(map(json.dumps, case["grammar"]))
    return case["kind"], case["grammar"]


@pytest.mark.parametrize("name", ["practice", "grammars", "suite_honoured"])
def test_texts_of_a_grammar_are_allowed_and_no_others(compiled, tree: LLTokenizer, name: str) -> None:
    wrong = []
    for case in cases(name):
        allowed = partial(allows, compiled(*source_of(case)), tree)
        wrong += [f"{case}: {text} is not allowed" for text in case["accept"] if not allowed(text)]
        wrong += [f"{case}: {text} is allowed" for text in case["reject"] if allowed(text)]
    assert wrong == []


@pytest.mark.parametrize("name", ["refuse", "suite_refused"])
def test_a_schema_that_cannot_be_enforced_is_refused(compiled, name: str) -> None:
    for case in cases(name):
        with pytest.raises(GrammarError):
            compiled("json_schema", case["schema"])


@pytest.mark.parametrize(
    ("kind", "source", "message"),
    [
        ("json_schema", {"type": "array", "uniqueItems": True}, "uniqueItems"),
        ("json_schema", {"type": "object", "properties": {"a": {"not": {}}}}, "not"),
        ("json_schema", {"items": {"anyOf": [{"type": "string", "nullable": True}]}}, "nullable"),
        ("json_schema", {"format": "phone", "type": "string"}, "phone"),
        ("json_schema", {"type": "integer", "minimum": 5, "maximum": 1}, "minimum .*5.* maximum .*1"),
        ("json_schema", {"$ref": "#"}, "no text"),
        ("json_schema", {"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}}, "uniqueItems"),
        ("json_schema", [1], r"object.*\[1"),
        ("regex", "(?=a)b", "look-ahead"),
        ("ebnf", "start: nothing", "nothing"),
        ("json_schema", {"items": [{"type": "integer", "nullable": True}]}, "nullable"),
        ("json_schema", {"$ref": "#/a/b", "a": {"b": {"type": "string", "nullable": True}}}, "nullable"),
        ("json_schema", {"type": "integer", "multipleOf": 3_000_001}, "multipleOf .*3000001"),
        ("json_schema", {"items": {"allOf": [{"multipleOf": 0.997}, {"multipleOf": 991}]}}, "multipleOf"),
        ("json_schema", {"type": "integer", "divisibleBy": 2}, "multipleOf"),
        ("structural_tag", {"format": {}}, "const_string"),
        (
            "structural_tag",
            {"format": {"type": "tag", "begin": "<a>", "content": {"type": "x"}, "end": ""}},
            "json_schema",
        ),
        ("structural_tag", {"format": {"type": "regex"}}, "pattern"),
        (
            "structural_tag",
            {"format": {"type": "sequence", "elements": [{"type": "any_text"}] * 2}},
            "any_text .* last",
        ),
        ("structural_tag", {"structures": [], "triggers": []}, "structures"),
        ("structural_tag", {"structures": [{"begin": "<a>", "schema": {}, "end": ""}], "triggers": ["<b"]}, "<a>"),
    ],
)
def test_the_reason_names_what_is_wrong(compiled, kind: str, source: object, message: str) -> None:
    with pytest.raises(GrammarError, match=message):
        compiled(kind, source)


def test_a_property_may_have_the_name_of_a_keyword(compiled, tree: LLTokenizer) -> None:
    grammar = compiled("json_schema", {"type": "object", "properties": {"nullable": {"type": "integer"}}})
    assert allows(grammar, tree, '{"nullable": 1}')


def test_white_space_is_bounded(compiled, tree: LLTokenizer) -> None:
    grammar = compiled("json_schema", {"type": "object", "properties": {"a": {}}, "required": ["a"]})
    assert allows(grammar, tree, '{\n                        "a": 1\n}')
    for text in ('{  "a": 1}', '{"a": \n\n1}', '{\n                         "a": 1}'):
        assert not allows(grammar, tree, text)


def test_tags_are_filled_and_the_text_between_is_free(compiled, tree: LLTokenizer) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    structures = [{"begin": f"<f={name}>", "schema": schema, "end": "</f>"} for name in ("x", "y")]
    grammar = compiled("structural_tag", {"structures": structures, "triggers": ["<f="]})
    for text in ("", "a <b> c", 'hm <f=x>{"a": 1}</f> and <f=y>{"a": 2}</f>.'):
        assert allows(grammar, tree, text)
    for text in ("<f=z>", '<f=x>{"a": "1"}</f>', '<f=x>{"a": 1}'):
        assert not allows(grammar, tree, text)


TAG = {
    "type": "tag",
    "begin": "<a>",
    "content": {"type": "json_schema", "json_schema": {"type": "integer"}},
    "end": "</a>",
}


@pytest.mark.parametrize(
    ("form", "allowed", "refused"),
    [
        ({"type": "const_string", "value": "ab"}, ["ab"], ["a", "abc"]),
        ({"type": "any_text"}, ["", "x\ny"], []),
        (TAG, ["<a>12</a>"], ["<a>x</a>", "12"]),
        ({**TAG, "content": {"type": "any_text"}}, ["<a>b < c</a>"], ["<a>b", "<a>b</a> c"]),
        ({**TAG, "content": {"type": "regex", "pattern": "x+"}}, ["<a>xx</a>"], ["<a></a>"]),
        ({"type": "sequence", "elements": [TAG, {"type": "grammar", "grammar": 'start: "!"'}]}, ["<a>1</a>!"], ["!"]),
        ({"type": "or", "elements": [TAG, {"type": "const_string", "value": "-"}]}, ["<a>1</a>", "-"], ["", "--"]),
        (
            {"type": "triggered_tags", "triggers": ["<a"], "tags": [TAG]},
            ["", "so <a>1</a> and <a>2</a>.", "<b>"],
            ["<ab", "<a>x</a>"],
        ),
        (
            {
                "type": "triggered_tags",
                "triggers": ["<a"],
                "tags": [TAG],
                "at_least_one": True,
                "stop_after_first": True,
            },
            ["<a>1</a>", "so <a>1</a>"],
            ["", "so", "<a>1</a>."],
        ),
        (
            {"type": "triggered_tags", "triggers": ["<a"], "tags": [TAG], "stop_after_first": True},
            ["", "so", "so <a>1</a>"],
            ["<a>1</a> <a>2</a>", "<a>1</a>."],
        ),
        (
            {
                **TAG,
                "content": {"type": "or", "elements": [{"type": "any_text"}, {"type": "const_string", "value": "x"}]},
            },
            ["<a>x</a>", "<a>some</a>"],
            ["<a>", "<a>x</a>b"],
        ),
        (
            {"type": "sequence", "elements": [{"type": "const_string", "value": "x"}, {"type": "any_text"}]},
            ["x", "x y"],
            ["y"],
        ),
        (
            {"type": "tags_with_separator", "tags": [TAG], "separator": ", "},
            ["", "<a>1</a>, <a>2</a>"],
            ["<a>1</a><a>2</a>", "<a>1</a>, "],
        ),
    ],
)
def test_the_newer_form_of_tags(compiled, tree: LLTokenizer, form: dict, allowed: list, refused: list) -> None:
    grammar = compiled("structural_tag", {"type": "structural_tag", "format": form})
    assert [text for text in allowed if not allows(grammar, tree, text)] == []
    assert [text for text in refused if allows(grammar, tree, text)] == []


def test_texts_that_spell_a_token_with_a_name_are_possible(stories260k: Path) -> None:
    tokenizer = load_tokenizer(str(stories260k))
    tokenizer.backend.add_tokens(["<tool_call>", "<think>"])
    tokenizer.added_tokens |= {512: "<tool_call>", 513: "<think>"}
    vocabulary = token_tree(tokenizer, 514, [EOS])
    spelled = [token for part in ("<", "think", ">x") for token in vocabulary.tree.tokenize_str(part)]
    for kind, text in (
        ("regex", "<think>x"),
        ("ebnf", 'start: "<think>x"'),
        ("json_schema", '{"const": "<think>x"}'),
    ):
        matcher = compile_grammar(vocabulary, Grammar(kind, text)).matcher()
        quote = vocabulary.tree.tokenize_str('"') if kind == "json_schema" else []
        for token in [*quote, *spelled, *quote]:
            assert matcher.mask()[token // 32] >> (token % 32) & 1
            matcher.advance([token])
    tag = {
        "structures": [{"begin": "<tool_call>", "schema": {"type": "integer"}, "end": "<think>"}],
        "triggers": ["<tool"],
    }
    tag["triggers"] = ["<tool_call>"]
    matcher = compile_grammar(vocabulary, Grammar("structural_tag", json.dumps(tag))).matcher()
    matcher.advance([512, *vocabulary.tree.tokenize_str("7"), 513])
    assert matcher.mask()[EOS // 32] >> (EOS % 32) & 1


def test_a_token_that_is_not_allowed_is_an_error_from_then_on(compiled, tree: LLTokenizer) -> None:
    matcher = compiled("regex", "ab").matcher()
    with pytest.raises(GrammarError):
        matcher.advance(tree.tokenize_str("b"))
    with pytest.raises(GrammarError):
        matcher.mask()


def test_copies_do_not_disturb_each_other(compiled, tree: LLTokenizer) -> None:
    grammar = compiled("regex", "a[bc]")
    first, second = grammar.matcher(), grammar.matcher()
    first.advance(tree.tokenize_str("a"))
    assert not np.array_equal(first.mask(), second.mask())
    assert np.array_equal(second.mask(), grammar.matcher().mask())


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "((a+)+)+b{1,2000}$"},
        {"enum": [f"{i}" for i in range(20_000)]},
        {"anyOf": [{"type": "object", "properties": {f"p{i}": {"type": "string"}}} for i in range(500)]},
    ],
    ids=["repeats", "values", "alternatives"],
)
def test_a_hostile_schema_takes_bounded_effort(compiled, schema: dict) -> None:
    compiled("json_schema", schema).matcher().mask()


def test_a_vocabulary_without_an_end_has_no_grammars(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "end_ids", ())
    with pytest.raises(ValueError, match=re.compile("token .* ends an answer")):
        token_tree(tokenizer, 512, [])
