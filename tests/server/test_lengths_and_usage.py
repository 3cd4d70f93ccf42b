"""Lengths that a request leaves open, scoring without output, and usage and padding in chunks. The context is 512."""

from __future__ import annotations

import json

import httpx
import pytest

from messages import says

FULL = [1, 403, 407, 261] * 128  # fills the context
CHAT, COMPLETIONS, GENERATE = "/v1/chat/completions", "/v1/completions", "/generate"
LONG_TALK = [{"role": "user", "content": "a" * 470}]


def ask(http: httpx.Client, path: str, **body) -> dict | list:
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def events(http: httpx.Client, path: str, **body) -> list[dict]:
    answer = http.post(path, json=body | {"stream": True})
    assert answer.status_code == 200, answer.text
    lines = answer.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def outputs(answer: dict | list) -> list[int]:
    """Numbers of tokens in the outputs of /generate."""
    return [each["meta_info"]["completion_tokens"] for each in (answer if isinstance(answer, list) else [answer])]


@pytest.mark.parametrize(("room", "expected"), [(12, 12), (1, 1), (100, 16)])
@pytest.mark.parametrize(("more", "choices"), [({}, 1), ({"n": 3}, 3), ({"echo": True, "logprobs": 1}, 1)])
def test_the_default_length_of_a_completion_is_cut_to_the_room(
    http: httpx.Client, room: int, expected: int, more: dict, choices: int
) -> None:
    answer = ask(http, COMPLETIONS, prompt=FULL[room:], ignore_eos=True, **more)
    assert answer["usage"]["completion_tokens"] == choices * expected
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["length"] * choices


def test_each_prompt_of_a_list_has_its_own_room(http: httpx.Client) -> None:
    prompts = [FULL[5:], FULL[20:], FULL[300:]]
    assert ask(http, COMPLETIONS, prompt=prompts, ignore_eos=True)["usage"]["completion_tokens"] == 5 + 16 + 16
    params = {"ignore_eos": True}
    assert outputs(ask(http, GENERATE, input_ids=prompts, sampling_params=params)) == [5, 20, 128]


@pytest.mark.parametrize(("least", "expected"), [(14, 16), (17, 17), (300, 300)])
def test_min_tokens_raises_the_default_length(http: httpx.Client, least: int, expected: int) -> None:
    answer = ask(http, COMPLETIONS, prompt=FULL[400:], ignore_eos=True, min_tokens=least)
    assert answer["usage"]["completion_tokens"] == expected


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        (COMPLETIONS, {"prompt": FULL}, "prompt … 512 … context … 512"),
        (COMPLETIONS, {"prompt": [FULL[9:], FULL]}, "prompt … 512 … context … 512"),
        (GENERATE, {"input_ids": FULL}, "prompt … 512 … context … 512"),
        (CHAT, {"messages": [{"role": "user", "content": "a" * 600}]}, "prompt … context … 512"),
        (COMPLETIONS, {"prompt": FULL[12:], "max_tokens": 13}, "prompt … 500 … max_tokens … 13 … context … 512"),
        (COMPLETIONS, {"prompt": [*FULL, 1], "max_tokens": 0}, "prompt … 513 … max_tokens … 0 … context … 512"),
        (CHAT, {"messages": LONG_TALK, "max_completion_tokens": 99}, "prompt … max_completion_tokens … 99 … 512"),
        (
            GENERATE,
            {"input_ids": FULL[12:], "sampling_params": {"max_new_tokens": 13}},
            "prompt … 500 … max_new_tokens … 13 … context … 512",
        ),
    ],
)
def test_only_a_length_that_was_asked_for_is_named(http: httpx.Client, path: str, body: dict, words: str) -> None:
    answer = http.post(path, json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
    message = answer.json()["error"]["message"]
    assert says(message, words)
    assert "prompt is too long" in message  # litellm, langchain and coding agents look for these words
    assert "this model's maximum context length is 512 tokens" in message
    asked = {"max_tokens", "max_completion_tokens", "sampling_params"} & set(body)
    assert ("max_" in message) == bool(asked)


@pytest.mark.parametrize("n", [1, 2])
def test_a_full_context_is_scored_without_output(http: httpx.Client, n: int) -> None:
    asked = {"prompt": FULL, "max_tokens": 0, "echo": True, "logprobs": 0, "n": n}
    answer = ask(http, COMPLETIONS, **asked)
    assert answer["usage"] | {"prompt_tokens_details": None} == {
        "prompt_tokens": 512,
        "completion_tokens": 0,
        "total_tokens": 512,
        "prompt_tokens_details": None,
    }
    for choice in answer["choices"]:
        assert choice["logprobs"]["token_logprobs"] == [None, *(-i / 8 for i in range(1, 512))]
        assert choice["finish_reason"] == "length"
    *chunks, last = events(http, COMPLETIONS, **asked, stream_options={"include_usage": True})
    assert [chunk["choices"][0]["logprobs"] for chunk in chunks] == [c["logprobs"] for c in answer["choices"]]
    assert last["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_context_is_scored_natively(http: httpx.Client, stream: bool) -> None:
    asked = {"input_ids": FULL, "return_logprob": True, "sampling_params": {"max_new_tokens": 0}}
    for start, scored in ((-1, 0), (0, 512), (510, 2), (512, 0)):
        body = asked | {"logprob_start_len": start}
        answer = events(http, GENERATE, **body)[-1] if stream else ask(http, GENERATE, **body)
        meta = answer["meta_info"]
        assert (answer["text"], answer["output_ids"], meta["completion_tokens"]) == ("", [], 0)
        assert (len(meta["input_token_logprobs"]), meta["output_token_logprobs"]) == (scored, [])
        assert meta["finish_reason"] == {"type": "length", "length": 0}


def test_a_completion_of_no_token_needs_no_echo(http: httpx.Client) -> None:
    answer = ask(http, COMPLETIONS, prompt="Once upon", max_tokens=0)
    assert (answer["choices"][0]["text"], answer["usage"]["completion_tokens"]) == ("", 0)


def test_an_empty_prompt_is_a_bos(http: httpx.Client) -> None:
    assert ask(http, COMPLETIONS, prompt="", max_tokens=1)["usage"]["prompt_tokens"] == 1
    refused = http.post(COMPLETIONS, json={"prompt": "", "add_special_tokens": False})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt")


def test_special_tokens_are_added_to_completions_and_not_to_chats(http: httpx.Client) -> None:
    talk = [{"role": "user", "content": "Once upon"}]
    for path, body, default in ((COMPLETIONS, {"prompt": ["Once upon"]}, True), (CHAT, {"messages": talk}, False)):
        count = {
            value: ask(http, path, **body, max_tokens=1, add_special_tokens=value)["usage"]["prompt_tokens"]
            for value in (True, False, None)
        }
        assert count[True] == count[False] + 1
        assert count[None] == count[default]
        key = "prompt" if "prompt" in body else "messages"
        asked = {key: talk if key == "messages" else "Once upon"}
        assert {value: ask(http, "/tokenize", **asked, add_special_tokens=value)["count"] for value in count} == count


@pytest.mark.parametrize(("path", "body"), [(COMPLETIONS, {"prompt": "a b c"}), (CHAT, {"messages": LONG_TALK[:1]})])
@pytest.mark.parametrize("include_usage", [True, False])
def test_every_chunk_has_the_usage_so_far(http: httpx.Client, path: str, body: dict, include_usage: bool) -> None:
    options = {"continuous_usage_stats": True, "include_usage": include_usage}
    chunks = events(http, path, **body, max_tokens=5, n=2, ignore_eos=True, stream_options=options)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 10
    for chunk in chunks:
        usage = chunk["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert [chunk["choices"] == [] for chunk in chunks] == [False] * (len(chunks) - include_usage) + [
        True
    ] * include_usage


def test_obfuscated_chunks_tell_nothing_by_their_size(http: httpx.Client) -> None:
    for path, body in ((COMPLETIONS, {"prompt": "Once upon a time"}), (CHAT, {"messages": LONG_TALK})):
        asked = body | {"max_tokens": 4, "stream": True, "stream_options": {"include_obfuscation": True}}
        lines = [line for _ in range(8) for line in http.post(path, json=asked).content.split(b"\n\n")]
        chunks = [line for line in lines if line.startswith(b"data: {")]  # one request may have a single one
        assert {(len(chunk) + 2) % 64 for chunk in chunks} == {0}
        padding = [json.loads(chunk[6:])["obfuscation"] for chunk in chunks]
        assert len(set(padding)) > 1
        plain = http.post(path, json=asked | {"stream_options": {"include_obfuscation": False}})
        assert b"obfuscation" not in plain.content


def test_other_stream_options_are_refused_by_name(http: httpx.Client) -> None:
    body = {"prompt": "a", "stream": True, "stream_options": {"include_usage": None, "chunked": True}}
    answer = http.post(COMPLETIONS, json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "stream_options.chunked")
