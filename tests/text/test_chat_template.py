"""Templates render as the models' authors meant them."""

from __future__ import annotations

import datetime
import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from sgl_jax.text import chat_template
from sgl_jax.text.chat_template import ChatTemplate, TemplateError

TEMPLATES = Path(__file__).parents[1] / "data" / "chat_templates"
USER = [{"role": "user", "content": "Hello <you> & é"}]

_MERGES = "llama.cpp's own code puts the system message into the first turn; the template refuses it or leaves it out"
_TOKENS = "the template reads additional_special_tokens, which the case does not give"
_LONGER = "the expected text has one more message than the conversation: a tool call of llama.cpp's own"
NOT_JINJA = {  # why the expected text is not what Jinja, and with it transformers, renders
    "mistralai/Mistral-7B-Instruct-v0.2 (NOTE: Old pre-v1 without a system prompt)": _MERGES,
    "google/gemma-7b-it": _MERGES,
    "OrionStarAI/Orion-14B-Chat": _MERGES,
    "Phi-3-mini": _MERGES,
    "Phi-3-medium": _MERGES,
    "ai-sage/GigaChat-20B-A3B-instruct": _TOKENS,
    "yandex/YandexGPT-5-Lite-8B-instruct": _MERGES,
    "ibm-granite/granite-3.x (tool call)": _LONGER,
    "ibm-granite/granite-4.0 (tool call)": _LONGER,
    "ibm-granite/granite-4.1 (tool call)": _LONGER,
}


def test_llama_cpp_cases() -> None:
    data = json.loads((TEMPLATES / "llama_cpp_template_cases.json").read_text())
    rendered = 0
    for case in data["cases"]:
        if case["name"] in NOT_JINJA:
            continue
        special = {"bos_token": case.get("bos_token", ""), "eos_token": case.get("eos_token", "")}
        text = ChatTemplate(case["template"], special).render(data["conversation"])
        assert text == (case["expected_jinja"] or case["expected"]), case["name"]
        rendered += 1
    assert rendered == 26


def test_real_templates_render_as_transformers_does(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """70 templates render four conversations, tools among them, or refuse them, as in transformers."""
    expected = json.loads((golden / "chat_templates.json").read_text())
    now = datetime.datetime.fromisoformat(expected["now"])
    monkeypatch.setattr(chat_template, "datetime", SimpleNamespace(datetime=SimpleNamespace(now=lambda: now)))
    found: dict[str, dict[str, str | None]] = {}
    for path in sorted(TEMPLATES.glob("*.jinja")):
        template = ChatTemplate(path.read_text(), expected["special_tokens"])
        found[path.stem] = {}
        for name, conversation in expected["conversations"].items():
            try:
                text = template.render(**conversation)
                found[path.stem][name] = hashlib.sha256(text.encode()).hexdigest()[:16]
            except TemplateError:
                found[path.stem][name] = None
    assert len(found) == 70
    assert found == expected["sha256_16"]


def test_tojson_is_plain_json() -> None:
    template = ChatTemplate("{{ messages[0] | tojson }}|{{ messages[0].content | tojson(indent=2) }}")
    assert template.render(USER) == '{"role": "user", "content": "Hello <you> & é"}|"Hello <you> & é"'


def test_names_and_tags_of_published_templates() -> None:
    template = ChatTemplate(
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}{{ strftime_now('%Y') }}{{ thinking }}"
    )
    year = datetime.datetime.now().year
    assert template.render(USER * 2, template_kwargs={"thinking": "on"}) == f"Hello <you> & é{year}on"


def test_blocks_are_trimmed() -> None:
    assert ChatTemplate("a\n  {% if true %}\nb\n  {% endif %}\nc").render(USER) == "a\nb\nc"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].absent.more }}", "absent"),
        ("{{ 1 + 'a' }}", "unsupported operand"),
        ("{{ messages.append(1) }}", "append"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_whatever_a_template_raises_is_a_template_error(source: str, message: str) -> None:
    with pytest.raises(TemplateError, match=message):
        ChatTemplate(source).render(USER)


def test_a_template_that_does_not_compile_is_refused_when_it_is_needed() -> None:
    broken = ChatTemplate("a\n{% for %}")
    for use in (broken.check, lambda: broken.render(USER)):
        with pytest.raises(TemplateError, match="line 2"):
            use()


def test_the_conversation_cannot_be_replaced_by_a_variable() -> None:
    with pytest.raises(TemplateError, match="messages"):
        ChatTemplate("").render(USER, template_kwargs={"messages": []})


@pytest.mark.parametrize("content", ["Sure", "Sure, ", "  Sure"])
@pytest.mark.parametrize("trim", ["", " | trim"])
def test_continue_final_message(content: str, trim: str) -> None:
    source = "{% for m in messages %}<{{ m.role }}>{{ m.content" + trim + " }}</>{% endfor %}"
    messages = [*USER, {"role": "assistant", "content": content}]
    text = ChatTemplate(source).render(messages, add_generation_prompt=False, continue_final_message=True)
    shown = content.strip() if trim else content
    assert text == f"<user>Hello <you> & é</><assistant>{shown}"


@pytest.mark.parametrize("content", ["end", "m", "im_end", "<|im_end|>", "end "])
@pytest.mark.parametrize("trim", ["", " | trim"])
def test_the_final_message_may_say_what_the_template_says_after_it(content: str, trim: str) -> None:
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content"
        + trim
        + " }}<|im_end|>\n{% endfor %}the end, um"
    )
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": content}]
    text = ChatTemplate(source).render(messages, add_generation_prompt=False, continue_final_message=True)
    shown = content.strip() if trim else content
    assert text == f"<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n{shown}"


def test_continue_final_message_of_parts() -> None:
    source = "{% for m in messages %}<{% for p in m.content %}{{ p.text }}{% endfor %}|end>{% endfor %}"
    parts = [{"type": "text", "text": "the"}, {"type": "text", "text": "end"}]
    messages = [{"role": "assistant", "content": parts}]
    text = ChatTemplate(source).render(messages, add_generation_prompt=False, continue_final_message=True)
    assert text == "<theend"


def test_continue_final_message_needs_one() -> None:
    with pytest.raises(TemplateError, match=r"continue_final_message.* message"):
        ChatTemplate("nothing").render(USER, add_generation_prompt=False, continue_final_message=True)
    with pytest.raises(
        TemplateError,
        match=r"continue_final_message.*add_generation_prompt|add_generation_prompt.*continue_final_message",
    ):
        ChatTemplate("nothing").render(USER, continue_final_message=True)
