"""No template stops the process that asks for it: one that takes too long or too much is refused, and the next renders."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sgl_jax.text.chat_template import ChatTemplate, TemplateError
from sgl_jax.text.template_process import TemplateProcess

TEMPLATES = Path(__file__).parents[1] / "data" / "chat_templates"
USER = [{"role": "user", "content": "Hello <you> & é \ud800"}]
PLAIN = ChatTemplate("{{ bos_token }}{{ messages[0].content }}", {"bos_token": "<s>"})


@pytest.fixture(scope="module")
def process() -> Iterator[TemplateProcess]:
    found = TemplateProcess(seconds=1.0)
    yield found
    found.close()


def test_it_renders_as_the_template_itself(process: TemplateProcess) -> None:
    long = [{"role": role, "content": f"{i}: one of many turns"} for i in range(250) for role in ("user", "assistant")]
    template = ChatTemplate((TEMPLATES / "Qwen-Qwen3-0.6B.jinja").read_text())
    for options in ({}, {"add_generation_prompt": False, "continue_final_message": True}):
        assert process.render(template, 10**6, messages=long, **options) == template.render(long, **options)
    assert process.render(PLAIN, 100, messages=USER) == "<s>" + USER[0]["content"]


def test_a_text_is_cut_behind_the_characters_that_are_of_use(process: TemplateProcess) -> None:
    assert process.render(ChatTemplate("{{ 'ab' * 10000000 }}"), 5, messages=USER) == "ababa"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% set x = 9 ** (9 ** 9) %}", "1 s"),
        ("{{ 'a' * 5000000000 }}", "memory"),
        ("{{ messages[0].content * 5000000000 }}", "memory"),
        ("{{ 'a' | center(5000000000) }}", "memory"),
        ("{{ '%5000000000d' % 1 }}", "memory"),
        ("{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}", "memory|1 s"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ " + "-" * 50_000 + "1 }}", "recursion"),
        ("{% if 1 %}" * 5_000, "recursion"),
        ("{{ raise_exception('never') }}", "never"),
        ("{% never %}", "never"),
    ],
)
def test_a_hostile_template_is_refused_and_the_next_one_renders(
    process: TemplateProcess, source: str, reason: str
) -> None:
    began = time.monotonic()
    with pytest.raises(TemplateError, match=reason):
        process.render(ChatTemplate(source), 100, messages=USER)
    assert process.render(PLAIN, 100, messages=USER).startswith("<s>Hello")
    assert time.monotonic() - began < 20


def test_a_process_that_ended_is_replaced() -> None:
    process = TemplateProcess()
    process.render(PLAIN, 100, messages=USER)
    assert process._process is not None
    os.kill(process._process.pid, signal.SIGKILL)
    with pytest.raises(TemplateError, match="ended"):
        process.render(PLAIN, 100, messages=USER)
    assert process.render(PLAIN, 100, messages=USER).startswith("<s>")
    process.close()


def test_the_process_ends_with_the_pipe_even_inside_a_template() -> None:
    process = TemplateProcess(seconds=0.5)
    process.render(PLAIN, 100, messages=USER)
    child = process._process
    assert child is not None
    assert child.stdin is not None
    conversation = {"messages": USER}
    child.stdin.write(json.dumps(["{{ 9 ** (9 ** 9) }}{{ messages }}", {}, 100, conversation]).encode() + b"\n")
    child.stdin.close()
    assert child.wait(20) == -signal.SIGPROF
    process.close()


def test_variables_that_are_nested_too_deeply_are_refused(process: TemplateProcess) -> None:
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(TemplateError, match=r"chat_template_kwargs.*deep"):
        process.render(PLAIN, 100, messages=USER, template_kwargs={"a": deep})


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% for k, v in a.items() %}{{ k }}={{ v }}{% endfor %}", "zone=é"),
        ("{{ a | tojson }}", '{"zone": "é"}'),
        ("{{ a }}", '{"zone": "é"}'),
        ("{{ 'x' + a + 'y' }}", 'x{"zone": "é"}y'),
        ("{{ 'x' ~ a }}", 'x{"zone": "é"}'),
        ("{{ a is mapping }}", "True"),
    ],
)
def test_arguments_of_calls_are_an_object_and_text(process: TemplateProcess, source: str, text: str) -> None:
    call = {"type": "function", "function": {"name": "now", "arguments": {"zone": "é"}}}
    messages = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    template = ChatTemplate("{% set a = messages[0].tool_calls[0].function.arguments %}" + source)
    assert process.render(template, 10**6, messages=json.loads(json.dumps(messages))) == text
