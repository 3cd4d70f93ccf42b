"""Tool calls and thoughts in chat completions. The template makes the last message the whole prompt, which the fake engine
repeats as its answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import tokenizers
from live_server import MODEL, LiveServer

from fakes.fake_core import FakeCore, fake_info
from messages import says
from sgl_jax.server.answer_formats import answer_format, chat_formats, shown_tokens
from sgl_jax.server.openai_types import ChatCompletionRequest
from sgl_jax.settings.flag_parser import FlagError
from sgl_jax.settings.server_args import ServerArgs
from sgl_jax.text.tokenizer import Tokenizer, load_tokenizer
from sgl_jax.text.tool_calls.answer import Arguments, Call, Text
from sgl_jax.text.tool_calls.scanner import AnswerScanner
from sgl_jax.text.vocabulary import Vocabulary

TEMPLATE = str(Path(__file__).parent / "tool_template.jinja")
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {"a": {}}}}}
    for name in ("first", "second")
]
CALL = '<tool_call>\n{"name": "first", "arguments": {"a": [1, "é"]}}\n</tool_call>'
TWO = "Let me see.\n" + CALL + '\n<tool_call>\n{"name": "second", "arguments": {}}\n</tool_call>'


@pytest.fixture(scope="module")
def live(repeating: LiveServer) -> LiveServer:
    return repeating


def ask(client: openai.OpenAI, answer: str, **more: Any) -> Any:
    body = {"model": "stories", "messages": [{"role": "user", "content": answer}], "tools": TOOLS} | more
    return client.chat.completions.create(**body)


def streamed(client: openai.OpenAI, answer: str, **more: Any) -> tuple[dict[str, Any], list[Any]]:
    """Return the message that the deltas of a stream add up to, and the deltas."""
    chunks = list(ask(client, answer, stream=True, **more))
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    calls: list[dict[str, Any]] = []
    for call in (call for delta in deltas for call in delta.tool_calls or ()):
        if call.id is not None:
            assert (call.index, call.type, call.function.arguments) == (len(calls), "function", "")
            calls.append({"name": call.function.name, "arguments": "", "id": call.id})
        else:
            assert (call.index, call.function.name) == (len(calls) - 1, None)
            calls[-1]["arguments"] += call.function.arguments
    found = {
        "content": "".join(delta.content or "" for delta in deltas),
        "thought": "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas),
        "calls": calls,
        "finish": [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1],
    }
    return found, deltas


def whole(client: openai.OpenAI, answer: str, **more: Any) -> dict[str, Any]:
    choice = ask(client, answer, **more).choices[0]
    message = choice.message
    calls = [call.function.model_dump() | {"id": call.id} for call in message.tool_calls or ()]
    thought = getattr(message, "reasoning_content", None) or ""
    return {"content": message.content or "", "thought": thought, "calls": calls, "finish": choice.finish_reason}


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    return message | {
        "calls": [{key: value for key, value in call.items() if key != "id"} for call in message["calls"]]
    }


def both(client: openai.OpenAI, answer: str, **more: Any) -> dict[str, Any]:
    """Return an answer, which is the same whole and as a stream."""
    found, (in_pieces, _) = whole(client, answer, **more), streamed(client, answer, **more)
    found["content"] = found["content"].lstrip(" ")  # SentencePiece puts a space before a text
    in_pieces["content"] = in_pieces["content"].lstrip(" ")
    assert without_ids(found) == without_ids(in_pieces)
    return found


def test_calls_come_with_ids_and_indices_after_the_text(client: openai.OpenAI) -> None:
    found = both(client, TWO)
    first, second = found["calls"]
    assert (first["name"], json.loads(first["arguments"])) == ("first", {"a": [1, "é"]})
    assert (second["name"], second["arguments"]) == ("second", "{}")
    assert first["id"].startswith("call_")
    assert first["id"] != second["id"]
    assert (found["content"], found["finish"]) == ("Let me see.", "tool_calls")


def test_arguments_come_in_pieces(client: openai.OpenAI) -> None:
    _, deltas = streamed(client, CALL)
    pieces = [call.function.arguments for delta in deltas for call in delta.tool_calls or ()]
    assert len(pieces) > 5


def test_a_message_with_calls_alone_has_no_content(live: LiveServer) -> None:
    body = {"messages": [{"role": "user", "content": CALL}], "tools": TOOLS}
    with live.http() as http:
        message = http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
    assert message["content"] is None
    assert "reasoning_content" not in message


@pytest.mark.parametrize("more", [{"tools": []}, {"tool_choice": "none"}])
def test_without_tools_the_text_stays(client: openai.OpenAI, more: dict[str, Any]) -> None:
    found = both(client, CALL, **more)
    assert (found["content"], found["calls"], found["finish"]) == (CALL, [], "stop")


def test_one_call_at_most_without_parallel_calls(client: openai.OpenAI) -> None:
    found = both(client, TWO, parallel_tool_calls=False)
    assert [call["name"] for call in found["calls"]] == ["first"]


def test_length_stays_the_finish_reason(client: openai.OpenAI) -> None:
    found = both(client, CALL, max_tokens=40)
    assert (found["finish"], [call["name"] for call in found["calls"]]) == ("length", ["first"])


def test_a_stop_string_inside_a_call_stays_the_finish_reason(client: openai.OpenAI) -> None:
    found = both(client, CALL, stop="é")
    assert (found["finish"], found["calls"][0]["arguments"]) == ("stop", '{"a": [1, "')


def test_an_id_that_comes_again_is_replaced(client: openai.OpenAI) -> None:
    call = '<tool_call>{"id": "7", "name": "first", "arguments": {}}</tool_call>'
    for found in (whole(client, call * 2), streamed(client, call * 2)[0]):
        assert found["calls"][0]["id"] == "7"
        assert found["calls"][1]["id"].startswith("call_")


def test_scores_do_not_spell_a_hidden_thought(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, "<think>a</think>b", logprobs=True, extra_body={"include_reasoning": False})
    assert error.value.param == "logprobs"
    assert says(str(error.value), "logprobs: true … include_reasoning: false … leave out one")


def test_thoughts_are_split_off_and_counted(client: openai.OpenAI) -> None:
    answer = "<think>\nA é thought.\n</think>\n\nDone."
    found = both(client, answer)
    assert (found["thought"], found["content"]) == ("A é thought.", "Done.")
    usage = ask(client, answer).usage
    tokenizer = load_tokenizer(MODEL)
    marker = len(tokenizer.encode("<think>", add_special_tokens=False))
    closed = len(tokenizer.encode("<think>\nA é thought.\n", add_special_tokens=False))
    assert usage.completion_tokens_details.reasoning_tokens == closed - marker


def test_a_thought_that_the_prompt_opens(client: openai.OpenAI) -> None:
    found = both(client, "Hm.</think>Yes.", extra_body={"chat_template_kwargs": {"enable_thinking": True}})
    assert (found["thought"], found["content"]) == ("Hm.", "Yes.<think>")


def test_thoughts_where_they_are_asked_for(client: openai.OpenAI) -> None:
    answer = "<think>a b c d</think>Yes."
    _, deltas = streamed(client, answer, extra_body={"stream_reasoning": False})
    assert [delta.reasoning_content for delta in deltas if hasattr(delta, "reasoning_content")] == ["a b c d"]
    stays = both(client, answer, extra_body={"separate_reasoning": False})
    assert (stays["thought"], stays["content"]) == ("", answer)
    left_out = both(client, answer, extra_body={"include_reasoning": False})
    assert (left_out["thought"], left_out["content"]) == ("", "Yes.")


def test_a_call_of_a_function_that_was_not_given_is_handed_on(client: openai.OpenAI) -> None:
    """Nothing binds a loose call. The client can tell the model that there is no such function."""
    found = both(client, CALL.replace("first", "third"))
    assert [(call["name"], json.loads(call["arguments"])) for call in found["calls"]] == [("third", {"a": [1, "é"]})]
    assert (found["content"], found["finish"]) == ("", "tool_calls")


def test_each_choice_is_read_for_itself(client: openai.OpenAI) -> None:
    choices = ask(client, CALL, n=2).choices
    assert [choice.message.tool_calls[0].function.name for choice in choices] == ["first", "first"]
    assert choices[0].message.tool_calls[0].id != choices[1].message.tool_calls[0].id


def test_a_wrong_parser_is_named() -> None:
    with pytest.raises(FlagError) as caught:
        ServerArgs(model_path="a", tool_call_parser="nobody")
    assert says(str(caught.value), "--tool-call-parser … nobody … hermes")


@pytest.mark.parametrize(("parser", "more"), [("none", {}), ("think", {"separate_reasoning": False})])
def test_a_thought_in_the_content_does_not_switch_bare_calls_off(parser: str, more: dict[str, Any]) -> None:
    args = ServerArgs(model_path="a", tool_call_parser="llama3", reasoning_parser=parser)
    body = ChatCompletionRequest.model_validate({"messages": [{"role": "user", "content": "a"}], "tools": TOOLS} | more)
    formats = chat_formats(args, "<think></think>", load_tokenizer(MODEL))
    form = answer_format(formats, body, body.tools or [], "a")
    assert form is not None
    scanner = AnswerScanner(form)
    parts = scanner.push('<think>b</think>\n{"name": "first", "parameters": {}}') + scanner.finish()
    assert parts == [Text("<think>b</think>"), Call("first", None), Arguments("{}")]


@pytest.fixture(scope="module")
def special() -> Iterator[openai.OpenAI]:
    """Serve a vocabulary in which markers are special tokens, and others, too."""
    backend = tokenizers.Tokenizer.from_file(f"{MODEL}/tokenizer.json")
    backend.add_special_tokens(["<tool_call>", "</tool_call>", "<think>", "</think>", "<|other|>"])
    found = Vocabulary(backend, special_tokens={"bos_token": "<s>", "eos_token": "</s>"})
    with LiveServer(
        lambda: FakeCore(fake_info(vocab_size=517)), chat_template=TEMPLATE, reasoning_parser="qwen3"
    ) as server:
        server.service.tokenizer = Tokenizer(found, Path(TEMPLATE).read_text())
        with server.openai() as client:
            yield client


def test_markers_that_are_special_tokens_are_seen_by_the_reader_alone(special: openai.OpenAI) -> None:
    answer = f"<think>So<|other|>.</think>On<|other|>ce.{CALL}"
    found = both(special, answer)
    assert (found["thought"].replace(" ", ""), found["content"].replace(" ", "")) == ("So.", "Once.")
    assert [call["name"] for call in found["calls"]] == ["first"]
    plain = both(special, answer, tools=[], extra_body={"separate_reasoning": False})
    hidden = CALL.replace("<tool_call>", "").replace("</tool_call>", "")
    assert plain["content"].replace(" ", "") == "<think>So.</think>Once." + hidden.replace(" ", "")


def test_markers_of_thoughts_stay_in_the_text_where_none_are_split_off() -> None:
    args = ServerArgs(model_path="a", reasoning_parser="none")
    backend = tokenizers.Tokenizer.from_file(f"{MODEL}/tokenizer.json")
    backend.add_special_tokens(["<think>", "</think>", "<|channel|>", "<|return|>", "<|other|>"])
    found = Tokenizer(Vocabulary(backend, special_tokens={"eos_token": "<|return|>"}), "")
    for template, shown in (("<think></think>", {"<think>", "</think>"}), ("<|channel|>analysis", {"<|channel|>"})):
        formats = chat_formats(args, template, found)
        assert {*shown_tokens(None, formats, found).values()} == shown


def test_tokens_of_a_thought_are_counted_without_skipped_ones_before_it(special: openai.OpenAI) -> None:
    backend = tokenizers.Tokenizer.from_file(f"{MODEL}/tokenizer.json")
    usage = ask(special, "<|other|><think>Once upon a time</think>Yes.").usage
    inside = len(backend.encode("Once upon a time", add_special_tokens=False).ids)
    assert usage.completion_tokens_details.reasoning_tokens == inside
