"""Chat completions through the official client. The fake engine answers with the prompt itself, then eos."""

from __future__ import annotations

import httpx
import openai
import pytest
from live_server import MODEL, LiveServer, tokenizer

from sgl_jax.engine.messages import Generate
from sgl_jax.text.tokenizer import load_tokenizer

MESSAGES = [{"role": "user", "content": "Once upon a time"}]
PROMPT = "user: Once upon a time\nassistant: "  # after plain_template.jinja
TOKENS = tokenizer().encode("<s>" + PROMPT, add_special_tokens=False)


def ask(client: openai.OpenAI, **more):
    return client.chat.completions.create(**({"model": "stories", "messages": MESSAGES} | more))


def test_answer_and_usage(client: openai.OpenAI) -> None:
    answer = ask(client)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == " " + PROMPT
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(TOKENS), len(TOKENS) + 1)
    assert answer.usage.total_tokens == 2 * len(TOKENS) + 1
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == "stories"


def test_the_second_time_the_prompt_is_cached(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "cached"}]
    assert ask(client, messages=messages).usage.prompt_tokens_details.cached_tokens == 0
    again = ask(client, messages=messages).usage
    assert again.prompt_tokens_details.cached_tokens == again.prompt_tokens - 1
    salted = ask(client, messages=messages, extra_body={"cache_salt": "mine"}).usage
    assert salted.prompt_tokens_details.cached_tokens == 0


def test_max_tokens_by_both_names(client: openai.OpenAI) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        answer = ask(client, **{name: 4})
        assert answer.usage.completion_tokens == 4
        assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize("include_usage", [False, True])
def test_stream(slow_client: openai.OpenAI, include_usage: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if include_usage else {}
    chunks = list(ask(slow_client, stream=True, **options))
    with_choices = [chunk for chunk in chunks if chunk.choices]
    assert with_choices[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content or "" for chunk in with_choices]
    assert "".join(pieces) == " " + PROMPT
    assert sum(map(bool, pieces)) > 5  # it really comes in pieces
    assert [chunk.choices[0].finish_reason for chunk in with_choices[-2:]] == [None, "stop"]
    assert len({chunk.id for chunk in chunks}) == 1
    if include_usage:
        assert chunks[-1].choices == []
        assert chunks[-1].usage.completion_tokens == len(TOKENS) + 1
        assert all(chunk.usage is None for chunk in with_choices)
    else:
        assert all("usage" not in chunk.model_dump(exclude_unset=True) for chunk in chunks)


def test_stream_ends_with_done(slow: LiveServer) -> None:
    with slow.http() as http:
        answer = http.post("/v1/chat/completions", json={"messages": MESSAGES, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert "content-length" not in answer.headers
    assert answer.text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("stream", [False, True])
def test_n_choices_each_have_their_index(slow_client: openai.OpenAI, stream: bool) -> None:
    answer = ask(slow_client, n=3, max_tokens=6, stream=stream)
    if stream:
        texts = ["", "", ""]
        for chunk in answer:
            texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    else:
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        assert answer.usage.completion_tokens == 18
        assert answer.usage.prompt_tokens == len(TOKENS)
        texts = [choice.message.content for choice in answer.choices]
    assert texts == [tokenizer().decode(TOKENS[:6])] * 3 or texts == [" " + tokenizer().decode(TOKENS[:6])] * 3


def test_each_choice_has_its_own_seed(live: LiveServer, client: openai.OpenAI) -> None:
    ask(client, n=3, seed=2**64 - 2)
    sent = [command.params for command in live.core.commands if isinstance(command, Generate)][-3:]
    assert [params.seed for params in sent] == [2**64 - 2, 2**64 - 1, 0]
    assert all(params.n == 1 for params in sent)


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(slow_client: openai.OpenAI, stream: bool) -> None:
    answer = ask(slow_client, logprobs=True, top_logprobs=2, max_tokens=3, stream=stream)
    if stream:
        content = [
            entry for chunk in answer if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content
        ]
    else:
        content = answer.choices[0].logprobs.content
    spelled = tokenizer()
    assert [entry.token for entry in content] == [spelled.token_text(token) for token in TOKENS[:3]]
    assert [entry.logprob for entry in content] == [-0.125, -0.25, -0.375]
    assert [bytes(entry.bytes).decode() for entry in content] == [entry.token for entry in content]
    best = content[1].top_logprobs
    assert [(entry.token, entry.logprob) for entry in best] == [
        (spelled.token_text(TOKENS[1]), -0.25),
        (spelled.token_text(TOKENS[1] + 1), -1.25),
    ]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stop", ["on a", ["never", "pon"], "\nassistant"])
def test_stop_strings_across_tokens(slow: LiveServer, slow_client: openai.OpenAI, stop, stream: bool) -> None:
    answer = ask(slow_client, stop=stop, stream=stream)
    matched = stop if isinstance(stop, str) else stop[1]
    if stream:
        chunks = list(answer)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        reason = chunks[-1].choices[0].finish_reason
    else:
        text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
    assert text == (" " + PROMPT).partition(matched)[0]
    assert reason == "stop"


def test_stop_string_can_stay(client: openai.OpenAI) -> None:
    answer = ask(client, stop="on a", extra_body={"no_stop_trim": True})
    assert answer.choices[0].message.content == " user: Once upon a"


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_that_is_a_special_token_ends_the_answer(slow_client: openai.OpenAI, stream: bool) -> None:
    said = [{"role": "user", "content": "Once<unk> upon a time"}]
    for given, more, text in (
        ("<unk>", {}, " user: Once"),
        (["time", "Once<unk>"], {}, " user: "),
        ("<unk>", {"no_stop_trim": True}, " user: Once<unk>"),
        ("<unk>", {"skip_special_tokens": False}, "<s> user: Once"),
    ):
        answer = ask(slow_client, messages=said, stop=given, stream=stream, extra_body=more)
        if stream:
            chunks = list(answer)
            found = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            reason = chunks[-1].choices[0].finish_reason
        else:
            found, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
        assert (found, reason) == (text, "stop")


def test_an_empty_message_is_rendered(client: openai.OpenAI) -> None:
    answer = ask(client, messages=[{"role": "user", "content": ""}])
    assert answer.choices[0].message.content == " user: \nassistant: "


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ('{"zone": "Europe"}', '{"zone": "Europe"}'),
        ({"zone": {"a": [1]}}, '{"zone": {"a": [1]}}'),
        ('"{\\"a\\": 1}"', '{"a": 1}'),
        *((empty, "{}") for empty in ("", "null", '{"zone": "Euro', "7", "[1]", '"text"', "[" * 100_000, None, 7, [1])),
    ],
)
def test_arguments_of_earlier_calls_are_an_object_to_the_template(http, live, monkeypatch, arguments, shown) -> None:
    template = (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.arguments.items() | list | length }}"
    )
    template += "{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
    monkeypatch.setattr(live.service, "tokenizer", load_tokenizer(MODEL, template))
    call = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": arguments}}
    messages = [*MESSAGES, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "12:00"}]
    tokens = http.post("/tokenize", json={"messages": messages}).json()["tokens"]
    assert tokenizer().decode(tokens) == ("0" if shown == "{}" else "1") + shown


def test_continue_final_message(live: LiveServer, client: openai.OpenAI) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "there was"}]
    ask(client, messages=messages, max_tokens=1, extra_body={"continue_final_message": True})
    sent = [command for command in live.core.commands if isinstance(command, Generate)][-1]
    assert live.service.tokenizer.decode(sent.prompt_ids) == "user: Once upon a time\nassistant: there was"


def test_text_parts_and_developer_role(live: LiveServer, client: openai.OpenAI) -> None:
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
        {"role": "user", "content": "Hi"},
    ]
    ask(client, messages=messages, max_tokens=1)
    sent = [command for command in live.core.commands if isinstance(command, Generate)][-1]
    assert live.service.tokenizer.decode(sent.prompt_ids).startswith("system: Be brief.\nuser: Hi\n")


def test_an_answer_can_be_sent_back_as_the_client_dumps_it(client: openai.OpenAI) -> None:
    first = ask(client).choices[0].message.model_dump()
    assert ask(client, messages=[*MESSAGES, first, *MESSAGES]).choices[0].finish_reason == "stop"


def test_parameters_reach_the_engine(live: LiveServer, client: openai.OpenAI) -> None:
    extra = {"top_k": 7, "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 2, "stop_token_ids": [9]}
    extra |= {"ignore_eos": True, "skip_special_tokens": False, "disable_speculation": True}
    given = {"temperature": 0.5, "top_p": 0.9, "presence_penalty": 0.1, "frequency_penalty": 0.2, "seed": 3}
    ask(client, **given, logit_bias={"5": 2}, max_tokens=8, extra_body=extra)
    sent = [command for command in live.core.commands if isinstance(command, Generate)][-1].params
    for name, value in (given | extra | {"stop_token_ids": (9,), "logit_bias": {5: 2.0}, "max_tokens": 8}).items():
        assert getattr(sent, name) == value, name


def test_harmless_fields_are_taken(http: httpx.Client) -> None:
    body = {"messages": MESSAGES, "user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto"}
    body |= {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "modalities": ["text"]}
    assert http.post("/v1/chat/completions", json=body).status_code == 200
