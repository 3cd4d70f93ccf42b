"""Grammars of chat answers in every family's format: whatever they allow is read as the calls and thoughts that were asked for."""

from __future__ import annotations

import json
import random
from pathlib import Path

import jsonschema_rs
import numpy as np
import pytest
from tokenizers import AddedToken

from sgl_jax.constrained.call_rules import CALL_RULES
from sgl_jax.constrained.grammar import GrammarError, LibraryGrammar, LibraryMatcher, compile_grammar
from sgl_jax.constrained.token_tree import TokenTree, token_tree
from sgl_jax.request import Grammar, Json
from sgl_jax.text.tokenizer import Tokenizer, load_tokenizer
from sgl_jax.text.tool_calls.answer import Arguments, Call, Part, Text, Thought
from sgl_jax.text.tool_calls.answer_form import AnswerForm, CallableFunction
from sgl_jax.text.tool_calls.formats import CALLS, HARMONY, markers
from sgl_jax.text.tool_calls.scanner import AnswerFormat, AnswerScanner

EOS = 2
FORMATS = [*CALLS, HARMONY]
SPELLED = {
    "<function=",
    "[",
    "{",
    ";",
    '<｜DSML｜invoke name="',
    "<|channel>thought",
    "<|eom_id|>",
}  # by several tokens
ENDINGS = {"qwen3_coder": ("\n</parameter>\n",), "deepseek_v32": ("</｜DSML｜parameter>\n",)}  # they end values
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "description": "where"},
        "unit": {"enum": ["celsius", "kelvin"]},
        "days": {"type": "integer"},
        "exact": {"type": "boolean"},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
POINTS = {
    "type": "object",
    "properties": {"points": {"type": "array", "items": {"type": "number"}}, "name": {"type": ["string", "null"]}},
    "required": ["points"],
    "additionalProperties": False,
}
TOOLS = {
    "get_weather": WEATHER,
    "plot": POINTS,
    "now": {"type": "object", "properties": {}, "additionalProperties": False},
}
FUNCTIONS = tuple(CallableFunction(name, schema) for name, schema in TOOLS.items())
JSON_CONTENT = Grammar("json_schema", json.dumps(POINTS))


class Model:
    """A vocabulary in which the markers of a format are tokens, and answers that its grammars allow."""

    def __init__(self, folder: Path, calls: str | None, thoughts: str | None, without: tuple[str, ...] = ()):
        self.calls, self.thoughts = calls, thoughts
        self.tokenizer: Tokenizer = load_tokenizer(str(folder))
        own = [each for each in markers(calls, thoughts) if each not in {*SPELLED, *without}]
        self.tokenizer.backend.add_tokens(
            [AddedToken(each, normalized=False, special=each.startswith("[")) for each in own]
        )
        self.own = {each: self.tokenizer.backend.token_to_id(each) for each in own}
        self.tokenizer.added_tokens |= {token: each for each, token in self.own.items()}
        self.size = self.tokenizer.backend.get_vocab_size()
        self.texts = [self.tokenizer.token_text(token) for token in range(self.size)]
        self.vocabulary: TokenTree = token_tree(self.tokenizer, self.size, [EOS])

    def compiled(self, form: AnswerForm) -> LibraryGrammar:
        return compile_grammar(self.vocabulary, form.grammar())

    def answer(self, form: AnswerForm, seed: int, most: int = 900, begin: str = "") -> str:
        """Return an answer of random tokens, which ends as soon as it may once it is long."""
        rng, matcher = random.Random(seed), self.compiled(form).matcher()
        tokens: list[int] = self.vocabulary.tree.tokenize_str(begin)
        matcher.advance(tokens)
        closing = [token for token in range(self.size) if self.texts[token][:1] in set('"}])')]
        for _ in range(most):
            words = matcher.mask()
            allowed = [token for token in range(self.size) if words[token // 32] >> (token % 32) & 1]
            hurries = len(tokens) > 120 or rng.random() < 0.1
            if EOS in allowed and (hurries or len(tokens) > 60 or len(allowed) == 1):
                return self.text(tokens)
            begun = next(
                (end for end in (ENDINGS.get(form.calls or "", ()) if hurries else ()) if self.may_come(matcher, end)),
                None,
            )
            allowed = [token for token in allowed if token != EOS]
            marks = [token for token in self.own.values() if token in allowed]
            ending = (marks or [token for token in closing if token in allowed]) if hurries else []
            longest = max(rng.sample(allowed, min(2, len(allowed))), key=lambda token: len(self.texts[token]))
            added = self.vocabulary.tree.tokenize_str(begun) if begun else [rng.choice(ending) if ending else longest]
            tokens += added
            matcher.advance(added)
        raise AssertionError(f"endless: {self.text(tokens)!r}")

    def may_come(self, matcher: LibraryMatcher, text: str) -> bool:
        tokens = self.vocabulary.tree.tokenize_str(text)
        return matcher._matcher.validate_tokens(tokens) == len(tokens)

    def text(self, tokens: list[int]) -> str:
        return b"".join(map(self.tokenizer.token_bytes, tokens)).decode(errors="replace")

    def parts(self, form: AnswerForm, answer: str) -> list[Part]:
        scanner = AnswerScanner(AnswerFormat(form.calls, self.thoughts, form.thought, TOOLS))
        return scanner.push(answer) + scanner.finish()


def calls_of(parts: list[Part]) -> list[tuple[str, Json]]:
    found: list[tuple[str, str]] = []
    for part in parts:
        if isinstance(part, Call):
            found.append((part.name, ""))
        elif isinstance(part, Arguments):
            found[-1] = (found[-1][0], found[-1][1] + part.text)
    return [(name, loads(arguments)) for name, arguments in found]


def loads(text: str) -> Json:
    """Return a JSON value. A number beyond floats is not infinite, which is no JSON."""
    return json.loads(text, parse_float=lambda number: max(min(float(number), 1e300), -1e300))


def text_of(parts: list[Part], kind: type[Text] | type[Thought] = Text) -> str:
    return "".join(part.text for part in parts if isinstance(part, kind))


@pytest.fixture(scope="module")
def model(stories260k: Path):
    made: dict[tuple, Model] = {}

    def find(calls: str | None, thoughts: str | None = None, without: tuple[str, ...] = ()) -> Model:
        key = calls, thoughts, without
        return made.setdefault(key, made.get(key) or Model(stories260k, *key))

    return find


@pytest.mark.parametrize("name", FORMATS)
def test_a_forced_call_is_read_as_one_that_the_schemas_allow(model, name: str) -> None:
    form = AnswerForm(calls=name, functions=FUNCTIONS, must_call=True)
    it = model(name, HARMONY if name == HARMONY else None)
    for seed in range(12):
        answer = it.answer(form, seed)
        parts = it.parts(form, answer)
        calls = calls_of(parts)
        assert calls, answer
        assert text_of(parts).strip() == "", answer
        for function, arguments in calls:
            jsonschema_rs.validate(TOOLS[function], arguments)


@pytest.mark.parametrize("name", FORMATS)
def test_one_call_is_one(model, name: str) -> None:
    form = AnswerForm(calls=name, functions=FUNCTIONS, must_call=True, one_call=True)
    it = model(name, HARMONY if name == HARMONY else None)
    assert all(len(calls_of(it.parts(form, it.answer(form, seed)))) == 1 for seed in range(12))


@pytest.mark.parametrize("name", FORMATS)
def test_arguments_that_no_schema_binds_are_an_object(model, name: str) -> None:
    functions = (CallableFunction("get_weather", {"type": "object"}),)
    form = AnswerForm(calls=name, functions=functions, must_call=True)
    it = model(name, HARMONY if name == HARMONY else None)
    for seed in range(6):
        answer = it.answer(form, seed)
        calls = calls_of(it.parts(form, answer))
        assert calls, answer
        assert all(name == "get_weather" and isinstance(arguments, dict) for name, arguments in calls), answer


THOUGHTS = [("hermes", "think"), ("mistral", "mistral"), ("gemma4", "gemma4"), (HARMONY, HARMONY)]
BEGINS = {  # how calls and content begin
    "hermes": ("<tool_call>", "{"),
    "mistral": ("[TOOL_CALLS]", "{"),
    "gemma4": ("<|tool_call>", "{"),
    HARMONY: ("<|channel|>commentary", "<|channel|>final<|message|>{"),
}
MARKS = {
    "think": ("<think>", "</think>"),
    "mistral": ("[THINK]", "[/THINK]"),
    "gemma4": ("<|channel>thought", "<channel|>"),
}


@pytest.mark.parametrize("state", ["open", "unopened", "closed"])
@pytest.mark.parametrize(("calls", "thoughts"), THOUGHTS)
def test_content_stands_behind_the_thought(model, calls: str, thoughts: str, state: str) -> None:
    form = AnswerForm(thoughts=thoughts, thought=state, content=JSON_CONTENT)
    it, found = model(calls, thoughts), set()
    for seed in range(16):
        answer = it.answer(form, seed)
        parts = it.parts(form, answer)
        jsonschema_rs.validate(POINTS, loads(text_of(parts)))
        found.add(bool(text_of(parts, Thought).strip()))
    may_think = state != "closed" or thoughts == HARMONY
    assert found - {False} == ({True} if may_think else set())


@pytest.mark.parametrize("state", ["open", "unopened"])
@pytest.mark.parametrize(("calls", "thoughts"), THOUGHTS)
def test_calls_or_content_stand_behind_the_thought(model, calls: str, thoughts: str, state: str) -> None:
    form = AnswerForm(thoughts=thoughts, thought=state, calls=calls, functions=FUNCTIONS, content=JSON_CONTENT)
    it = model(calls, thoughts)
    behind = f"a{MARKS[thoughts][1]}" if state == "open" and thoughts != HARMONY else ""
    call, content = BEGINS[calls]
    for seed in range(8):
        answer = it.answer(form, seed, begin=behind + call)
        assert calls_of(it.parts(form, answer)), answer
        answer = it.answer(form, seed, begin=behind + content)
        parts = it.parts(form, answer)
        assert calls_of(parts) == []
        jsonschema_rs.validate(POINTS, loads(text_of(parts)))


@pytest.mark.parametrize("most", [0, 3, 30_000])
@pytest.mark.parametrize("content", [None, JSON_CONTENT], ids=["any", "json"])
@pytest.mark.parametrize(("calls", "thoughts"), THOUGHTS)
def test_a_thought_ends_with_its_budget(model, calls: str, thoughts: str, content: Grammar | None, most: int) -> None:
    it = model(calls, thoughts)
    state = "unopened" if thoughts == HARMONY else "open"
    form = AnswerForm(thoughts=thoughts, thought=state, content=content, max_thought_tokens=most)
    matcher, tree = it.compiled(form).matcher(), it.vocabulary.tree
    if thoughts == HARMONY:
        matcher.advance(tree.tokenize_str("<|channel|>analysis<|message|>"))
    closer = it.own["<|end|>" if thoughts == HARMONY else MARKS[thoughts][1]]
    word = tree.tokenize_str("a")[-1]
    for _ in range(min(most, 500)):
        assert matcher.mask()[word // 32] >> (word % 32) & 1
        matcher.advance([word])
    (allowed,) = (np.flatnonzero(np.unpackbits(matcher.mask().view(np.uint8), bitorder="little")),)
    assert closer in allowed
    assert (len(allowed) == 1) == (most < 500)


def test_a_budget_holds_for_a_thought_that_the_model_opens(model) -> None:
    it = model("hermes", "think")
    form = AnswerForm(thoughts="think", max_thought_tokens=2)
    allowed = lambda text: it.may_come(it.compiled(form).matcher(), text)  # noqa: E731
    assert allowed("<think>a</think>\n\nb <tool_call>")
    assert allowed("hm")
    assert not allowed("<think>abcdefg")
    assert not allowed("\n<think>abcdefg")
    assert not allowed("x<think>")


def test_calls_among_text_are_those_of_the_schemas(model) -> None:
    it = model("hermes", "think")
    form = AnswerForm(calls="hermes", functions=FUNCTIONS)
    allowed = lambda text, form=form: it.may_come(it.compiled(form).matcher(), text)  # noqa: E731
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    assert allowed(f"It is {call} and {call}.")
    assert allowed("None is needed.")
    assert not allowed('<tool_call>\n{"name": "then"')
    assert not allowed('<tool_call>\n{"name": "now", "arguments": {"a"')
    assert not allowed(f"{call} {call}", AnswerForm(calls="hermes", functions=FUNCTIONS, one_call=True))


def test_a_thought_may_have_markers_that_are_text(model) -> None:
    it = model(None, "think", ("<think>", "</think>"))
    form = AnswerForm(thoughts="think", thought="open", content=JSON_CONTENT)
    answer = 'Let me see.</think>\n{"points": [1]}'
    assert it.may_come(it.compiled(form).matcher(), answer)
    assert json.loads(text_of(it.parts(form, answer))) == {"points": [1]}
    with pytest.raises(GrammarError, match=r"budget .*</think>"):
        it.compiled(AnswerForm(thoughts="think", thought="open", max_thought_tokens=3))


CALLS_OF_C = {
    "qwen3_coder": "<tool_call>\n<function=f>\n<parameter=c>\n%s\n</parameter>\n</function>\n</tool_call>",
    "glm45": "<tool_call>f\n<arg_key>c</arg_key>\n<arg_value>%s</arg_value>\n</tool_call>",
    "deepseek_v32": '<｜DSML｜function_calls>\n<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="c" string="true">%s'
    "</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜function_calls>",
    "gemma4": '<|tool_call>call:f{c:<|"|>%s<|"|>}<tool_call|>',
}
ENUM = {"type": "string", "enum": ["a", "b"]}


@pytest.mark.parametrize("name", CALLS_OF_C)
@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#/$defs/C"},
        {"anyOf": [ENUM, {"type": "null"}]},
        {"anyOf": [{"const": "a"}, {"const": "b"}]},
        {"enum": ["a", None], "type": ["string", "null"]},
        {"enum": ["a", 1]},
    ],
    ids=["reference", "optional", "constants", "null", "mixed"],
)
def test_texts_are_those_of_the_schema_wherever_it_names_them(model, name: str, schema: dict) -> None:
    arguments = {"type": "object", "properties": {"c": schema}, "required": ["c"], "additionalProperties": False}
    arguments |= {"$defs": {"C": ENUM}}
    form = AnswerForm(calls=name, functions=(CallableFunction("f", arguments),), must_call=True)
    it = model(name)
    assert it.may_come(it.compiled(form).matcher(), CALLS_OF_C[name] % "a")
    assert not it.may_come(it.compiled(form).matcher(), CALLS_OF_C[name] % "zzz")
    for seed in range(6):
        scanner = AnswerScanner(AnswerFormat(name, None, "unopened", {"f": arguments}))
        for _, found in calls_of(scanner.push(it.answer(form, seed)) + scanner.finish()):
            jsonschema_rs.validate(arguments, found)


@pytest.mark.parametrize("name", CALLS_OF_C)
@pytest.mark.parametrize("further", [False, {"type": "integer"}])
def test_objects_without_properties_are_closed_where_the_schema_says_so(model, name: str, further: object) -> None:
    form = AnswerForm(calls=name, functions=(CallableFunction("f", {"additionalProperties": further}),), must_call=True)
    it = model(name)
    if further and name != "gemma4":  # raw text is held to no schema
        with pytest.raises(GrammarError, match="additionalProperties"):
            it.compiled(form)
    else:
        assert not it.may_come(it.compiled(form).matcher(), CALLS_OF_C[name] % "zzz")


def test_arguments_that_nothing_binds_may_have_any_type_and_name(model) -> None:
    form = lambda name: AnswerForm(calls=name, functions=(CallableFunction("f", {"type": "object"}),), must_call=True)  # noqa: E731
    for name, text in CALLS_OF_C.items():
        it = model(name)
        for key in ("c", "$filter", "größe", "user id"):
            wanted = (text % "3").replace("=c>", f"={key}>").replace(">c<", f">{key}<").replace('"c"', f'"{key}"')
            assert it.may_come(it.compiled(form(name)).matcher(), wanted.replace("{c:", f"{{{key}:"))
    it, text = model("deepseek_v32"), CALLS_OF_C["deepseek_v32"] % "3"
    assert it.may_come(it.compiled(form("deepseek_v32")).matcher(), text.replace('"true"', '"false"'))
    assert not it.may_come(
        it.compiled(form("deepseek_v32")).matcher(), (CALLS_OF_C["deepseek_v32"] % "x").replace('"true"', '"false"')
    )


def test_a_value_ends_where_the_reader_ends_it(model) -> None:
    it, form = model("qwen3_coder"), AnswerForm(calls="qwen3_coder", functions=FUNCTIONS, must_call=True)
    text = "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n<parameter=days>\nx</parameter>\n"
    assert not it.may_come(it.compiled(form).matcher(), text)


@pytest.mark.parametrize("name", ["llama3", "pythonic"])
def test_json_content_is_possible_beside_bare_calls(model, name: str) -> None:
    content = Grammar("json_schema", json.dumps({"type": "object"}))
    form, it = AnswerForm(calls=name, functions=FUNCTIONS, content=content), model(name)
    allowed = lambda text: it.may_come(it.compiled(form).matcher(), text)  # noqa: E731
    assert allowed('{"city": "Oslo"}')
    assert allowed('{"name": "Alice"}')
    assert allowed('{"name": "now", "parameters": {}}')


def test_markers_spelled_by_other_tokens_are_no_way_out(model) -> None:
    it = model("hermes", "think")
    form = AnswerForm(calls="hermes", functions=FUNCTIONS)
    spelled = [token for part in ("<", "tool_call>") for token in it.vocabulary.tree.tokenize_str(part)]
    assert it.compiled(form).matcher()._matcher.validate_tokens(spelled) < len(spelled)
    thought = AnswerForm(thoughts="think", thought="open", content=JSON_CONTENT)
    spelled = [token for part in ("a<", "/think>") for token in it.vocabulary.tree.tokenize_str(part)]
    assert it.compiled(thought).matcher()._matcher.validate_tokens(spelled) < len(spelled)


def test_a_budget_alone_leaves_what_follows_free(model) -> None:
    it = model(HARMONY, HARMONY)
    form = AnswerForm(thoughts=HARMONY, max_thought_tokens=3)
    allowed = lambda text: it.may_come(it.compiled(form).matcher(), text)  # noqa: E731
    assert allowed("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b")
    assert allowed(
        "<|channel|>commentary<|message|>b<|end|><|start|>assistant to=functions.f<|channel|>commentary<|message|>{}"
    )
    assert allowed(" to=functions.f<|channel|>commentary json<|message|>{}")


@pytest.mark.parametrize(
    ("calls", "schema", "message"),
    [
        ("hermes", {"properties": {"a": {"uniqueItems": True, "type": "array"}}}, "uniqueItems"),
        ("glm45", {"properties": {"a": {"type": "string", "pattern": "x+"}}}, "pattern .* a "),
        ("qwen3_coder", {"properties": {"a": {"type": "string", "maxLength": 3}}}, "maxLength"),
        ("deepseek_v32", {"oneOf": [{}], "properties": {}}, "oneOf"),
        ("gemma4", {"properties": {"a": {"type": "string", "minLength": 3}}}, "minLength"),
        ("functiongemma", {"properties": {"a": {"$ref": "#/a"}}, "a": {"$ref": "#/a"}}, "a"),
        ("glm45", {"properties": {"a": {"anyOf": [{"type": "string"}, {"type": "integer", "minimum": 3}]}}}, "minimum"),
        ("glm45", {"properties": {"a": {"type": "integer"}}, "required": ["b"]}, "required b"),
        ("gemma4", {"properties": {"a": {"type": "integer"}}, "required": ["b"]}, "required b"),
    ],
)
def test_arguments_that_cannot_be_enforced_are_refused_by_keyword(
    model, calls: str, schema: dict, message: str
) -> None:
    form = AnswerForm(calls=calls, functions=(CallableFunction("f", schema),), must_call=True)
    with pytest.raises(GrammarError, match=message):
        model(calls, HARMONY if calls == HARMONY else None).compiled(form)


def test_calls_among_text_need_a_token_that_begins_them(model) -> None:
    with pytest.raises(GrammarError, match="one token begins"):
        model("hermes", None, ("<tool_call>",)).compiled(AnswerForm(calls="hermes", functions=FUNCTIONS))


@pytest.mark.parametrize("name", ["llama3", "pythonic"])
def test_text_beside_bare_calls_is_not_read_as_one(model, name: str) -> None:
    it, form = model(name), AnswerForm(calls=name, functions=FUNCTIONS)
    kinds = set()
    for seed in range(30):
        answer = it.answer(form, seed, begin='{"name": "' if seed % 2 else "")
        calls = calls_of(it.parts(form, answer))
        for function, arguments in calls:
            jsonschema_rs.validate(TOOLS[function], arguments)
        kinds.add(bool(calls))
    assert kinds == {True, False}
    allowed = lambda text: it.may_come(it.compiled(form).matcher(), text)  # noqa: E731
    texts = ["", "Hm. { [", "\n a\n\n{b", "a [1]\n b\n", *([] if name == "pythonic" else ["a\n[b"])]
    assert [text for text in texts if not allowed(text)] == []
    assert not allowed('{"name": "now", "x"')
    assert not allowed(" [")
    assert allowed("a\n  [b") == (name == "llama3")


def test_every_format_that_is_read_can_be_written() -> None:
    assert set(CALL_RULES) == set(CALLS)
