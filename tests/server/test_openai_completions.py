"""Completions through the official client. The fake engine answers with the prompt itself, then eos."""

from __future__ import annotations

import openai
import pytest
from live_server import LiveServer, tokenizer

from sgl_jax.engine.messages import Generate


def ask(client: openai.OpenAI, prompt, **more):
    return client.completions.create(model="stories", prompt=prompt, **more)


def test_text_prompt(client: openai.OpenAI) -> None:
    answer = ask(client, "Once upon a time")
    assert answer.choices[0].text == " Once upon a time"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == answer.usage.prompt_tokens + 1


def test_max_tokens_is_16_if_not_set(client: openai.OpenAI) -> None:
    assert ask(client, "a", extra_body={"ignore_eos": True}).usage.completion_tokens == 16


def test_token_prompts_and_batches(client: openai.OpenAI) -> None:
    ids = tokenizer().encode("Once upon", add_special_tokens=False)
    assert ask(client, ids).choices[0].text == " Once upon"
    batch = ask(client, ["Once upon", "there was"], n=2)
    assert [choice.index for choice in batch.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in batch.choices] == [" Once upon"] * 2 + [" there was"] * 2
    assert batch.usage.prompt_tokens == 6
    assert [choice.text for choice in ask(client, [ids, ids]).choices] == [" Once upon"] * 2


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs(slow_client: openai.OpenAI, stream: bool) -> None:
    answer = ask(slow_client, "Once upon", echo=True, logprobs=1, max_tokens=2, stream=stream)
    if stream:
        text, tokens, scores, offsets, best = "", [], [], [], []
        for chunk in answer:
            text += chunk.choices[0].text
            if chunk.choices[0].logprobs:
                tokens += chunk.choices[0].logprobs.tokens
                scores += chunk.choices[0].logprobs.token_logprobs
                offsets += chunk.choices[0].logprobs.text_offset
                best += chunk.choices[0].logprobs.top_logprobs
    else:
        choice = answer.choices[0]
        text, tokens, scores = choice.text, choice.logprobs.tokens, choice.logprobs.token_logprobs
        offsets, best = choice.logprobs.text_offset, choice.logprobs.top_logprobs
    assert text == "Once upon Once"
    assert tokens == ["<s>", " Once", " upon", "<s>", " Once"]
    assert scores == [None, -0.125, -0.25, -0.125, -0.25]
    assert offsets == [0, 0, 4, 9, 9]
    assert best[:2] == [None, {" Once": -0.125}]


def test_echo_without_tokens_scores_the_prompt(client: openai.OpenAI) -> None:
    answer = ask(client, "Once upon", echo=True, logprobs=0, max_tokens=0)
    assert answer.choices[0].text == "Once upon"
    assert answer.choices[0].logprobs.token_logprobs == [None, -0.125, -0.25]
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 0


def test_stream_of_a_batch_with_usage(slow_client: openai.OpenAI) -> None:
    texts = ["", ""]
    chunks = list(ask(slow_client, ["Once upon", "there was"], stream=True, stream_options={"include_usage": True}))
    for chunk in chunks[:-1]:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [" Once upon", " there was"]
    assert chunks[-1].usage.completion_tokens == 8


def test_stream_interval_joins_tokens() -> None:
    with LiveServer(stream_interval=4) as server, server.openai() as client:
        ids = tokenizer().encode("Once upon a time there was a girl", add_special_tokens=False)
        pieces = [chunk.choices[0].text for chunk in ask(client, ids, stream=True, extra_body={"min_tokens": 1})]
        assert "".join(pieces) == " Once upon a time there was a girl"
        assert len(pieces) < len(ids)


def test_a_request_without_a_limit_gets_what_fits(live: LiveServer) -> None:
    with live.openai() as client:
        client.chat.completions.create(model="stories", messages=[{"role": "user", "content": "a"}])
    sent = [command for command in live.core.commands if isinstance(command, Generate)][-1]
    assert sent.params.max_tokens == live.core.info.context_length - len(sent.prompt_ids)


def test_best_of_equal_to_n_is_taken(client: openai.OpenAI) -> None:
    assert len(ask(client, "a", n=2, best_of=2).choices) == 2
