"""Structured output in every spelling, up to the engine, which is a fake that takes any grammar without the word "bad"."""

from __future__ import annotations

import json

import httpx
import pytest
from live_server import LiveServer

from messages import says
from sgl_jax.engine.messages import CompileGrammar, Generate

CHAT, COMPLETIONS, NATIVE = "/v1/chat/completions", "/v1/completions", "/generate"
BASE = {CHAT: {"messages": [{"role": "user", "content": "a"}]}, COMPLETIONS: {"prompt": "a"}, NATIVE: {"text": "a"}}
SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {}}}
AS_TEXT = '{"type":"object","properties":{"b":{"type":"integer"},"a":{}}}'
TAG = {"structures": [{"begin": "<a>", "schema": {}, "end": "</a>"}], "triggers": ["<a"]}


def sent(live: LiveServer) -> tuple[str, str]:
    """Return the grammar of the request that the engine got last."""
    [*_, last] = (command for command in live.core.commands if isinstance(command, Generate))
    grammar = last.params.grammar
    assert grammar is not None
    return grammar


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(
    ("body", "kind", "text"),
    [
        ({"response_format": {"type": "json_object"}}, "json_schema", '{"type":"object"}'),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, "json_schema", AS_TEXT),
        ({"response_format": {"type": "json_object", "value": SCHEMA}}, "json_schema", AS_TEXT),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": SCHEMA, "strict": False},
                }
            },
            "json_schema",
            AS_TEXT,
        ),
        (
            {"response_format": {"type": "structural_tag", **TAG}},
            "structural_tag",
            '{"type":"structural_tag","structures":[{"begin":"<a>","schema":{},"end":"</a>"}],"triggers":["<a"]}',
        ),
        ({"structured_outputs": {"json": SCHEMA}}, "json_schema", AS_TEXT),
        ({"structured_outputs": {"json": AS_TEXT, "regex": None}}, "json_schema", AS_TEXT),
        ({"structured_outputs": {"json_object": True}}, "json_schema", '{"type":"object"}'),
        ({"structured_outputs": {"regex": "a+"}}, "regex", "a+"),
        ({"structured_outputs": {"choice": ["a", 'q"']}}, "ebnf", 'start: "a" | "q\\""'),
        ({"structured_outputs": {"grammar": "root ::= a"}}, "ebnf", "root ::= a"),
        ({"guided_json": SCHEMA}, "json_schema", AS_TEXT),
        ({"guided_regex": "a+"}, "regex", "a+"),
        ({"guided_choice": ["yes", "no"]}, "ebnf", 'start: "yes" | "no"'),
        ({"guided_grammar": "root ::= a"}, "ebnf", "root ::= a"),
        ({"regex": "a+"}, "regex", "a+"),
        ({"ebnf": "root ::= a"}, "ebnf", "root ::= a"),
        ({"json_schema": AS_TEXT}, "json_schema", AS_TEXT),
        ({"json_schema": SCHEMA}, "json_schema", AS_TEXT),
    ],
)
def test_every_spelling_reaches_the_engine(
    live: LiveServer, http: httpx.Client, path: str, body: dict, kind: str, text: str
) -> None:
    assert http.post(path, json=BASE[path] | body).status_code == 200
    assert sent(live) == (kind, text)


@pytest.mark.parametrize(("given", "text"), [(SCHEMA, AS_TEXT), (AS_TEXT, AS_TEXT)])
def test_the_native_api_takes_objects_and_texts(live: LiveServer, http: httpx.Client, given: object, text: str) -> None:
    for params in ({"json_schema": given}, [{"json_schema": given}]):
        assert http.post(NATIVE, json=BASE[NATIVE] | {"sampling_params": params}).status_code == 200
        assert sent(live) == ("json_schema", text)


def test_a_grammar_is_compiled_once(live: LiveServer, http: httpx.Client) -> None:
    def asked() -> int:
        return sum(isinstance(command, CompileGrammar) for command in live.core.commands)

    before = asked()
    for _ in range(3):
        http.post(CHAT, json=BASE[CHAT] | {"regex": "once", "n": 2}).raise_for_status()
    assert asked() == before + 1


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        (CHAT, {"regex": "bad"}, "regex", "regex … bad"),
        (CHAT, {"guided_regex": "bad"}, "guided_regex", "guided_regex … bad"),
        (
            CHAT,
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"a": "bad"}}}},
            "response_format.json_schema.schema",
            "response_format.json_schema.schema … bad",
        ),
        (CHAT, {"structured_outputs": {"json": {"a": "bad {}"}}}, "structured_outputs.json", "structured_outputs.json"),
        (NATIVE, {"sampling_params": {"ebnf": "bad"}}, "ebnf", "ebnf … bad"),
        (CHAT, {"regex": "a", "response_format": {"type": "json_object"}}, "regex", "response_format … regex … one"),
        (COMPLETIONS, {"regex": "a", "ebnf": "a"}, "ebnf", "regex … ebnf … one"),
        (CHAT, {"structured_outputs": {"regex": "a", "json_object": True}}, "structured_outputs.json_object", "one"),
        (NATIVE, {"sampling_params": {"regex": "a", "json_schema": "{}"}}, "regex", "json_schema … regex … one"),
        (CHAT, {"regex": "a", "ignore_eos": True}, "ignore_eos", "ignore_eos … true … regex … eos"),
        (NATIVE, {"sampling_params": {"regex": "a" * (2**20 + 1)}}, "regex", "regex … 1048577 … 1048576"),
        (CHAT, {"guided_choice": []}, "guided_choice", "guided_choice"),
        (NATIVE, {"sampling_params": {"regex": "\ud800"}}, "regex", "regex … surrogate"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    http: httpx.Client, path: str, body: dict, param: str, message: str
) -> None:
    content = json.dumps(BASE[path] | body)  # lone surrogates as escapes
    refused = http.post(path, content=content, headers={"Content-Type": "application/json"})
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert error["param"] == param
    assert says(error["message"], message)
