"""sgl_jax.Engine on a real model: the same tokens whole, streamed and from asyncio; random weights; refused flags."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.requests import Request

import sgl_jax
from sgl_jax.engine.generation import EngineFailed
from sgl_jax.request import InvalidParameter
from sgl_jax.server.app_state import ServerState
from sgl_jax.server.encoding_bodies import ScoreRequest
from sgl_jax.server.token_scores import token_scores

SMALL = {"max_running_requests": 4, "chunked_prefill_size": 4, "max_total_tokens": 1024, "context_length": 256}
GREEDY = {"temperature": 0, "max_new_tokens": 40, "ignore_eos": True}


@pytest.fixture(scope="module")
def engine(stories260k: Path, tmp_path_factory) -> Iterator[sgl_jax.Engine]:
    cache = str(tmp_path_factory.mktemp("programs"))
    with sgl_jax.Engine(
        model_path=str(stories260k), dtype="float32", device="cpu", compilation_cache_dir=cache, **SMALL
    ) as engine:
        yield engine


@pytest.fixture(scope="module")
def cases(golden: Path) -> list[dict]:
    return json.loads((golden / "stories260k.json").read_text())["cases"]


def test_a_list_of_prompts_gives_the_reference_s_tokens(engine, cases):
    answers = engine.generate(input_ids=[case["prompt_ids"] for case in cases], sampling_params=GREEDY)
    assert [a["output_ids"] for a in answers] == [case["output_ids_200_greedy"][:40] for case in cases]


def test_text_is_encoded_as_the_reference_did(engine, cases):
    case = next(case for case in cases if case["prompt"])
    answer = engine.generate(case["prompt"], GREEDY)
    assert answer["meta_info"]["prompt_tokens"] == len(case["prompt_ids"])
    assert answer["output_ids"] == case["output_ids_200_greedy"][:40]


def test_streaming_ends_where_the_whole_answer_is(engine, cases):
    whole = engine.generate(input_ids=cases[0]["prompt_ids"], sampling_params=GREEDY)
    parts = list(engine.generate(input_ids=cases[0]["prompt_ids"], sampling_params=GREEDY, stream=True))
    assert len(parts) > 10
    assert parts[-1]["text"] == whole["text"]
    assert all(whole["text"].startswith(part["text"]) for part in parts)


def test_asyncio_gives_the_same(engine, cases):
    async def both() -> list[dict]:
        calls = (engine.async_generate(input_ids=case["prompt_ids"], sampling_params=GREEDY) for case in cases[:2])
        return await asyncio.gather(*calls)

    assert [a["output_ids"] for a in asyncio.run(both())] == [c["output_ids_200_greedy"][:40] for c in cases[:2]]


def test_random_weights_need_only_a_config(stories260k, tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((stories260k / name).read_bytes())
    options = {"load_format": "dummy", "dtype": "bfloat16", "random_seed": 3, "device": "cpu", **SMALL}
    with sgl_jax.Engine(model_path=str(tmp_path), compilation_cache_dir=str(tmp_path / "cache"), **options) as engine:
        answer = engine.generate(input_ids=[1, 2, 3], sampling_params={"max_new_tokens": 5, "ignore_eos": True})
        assert len(answer["output_ids"]) == 5


def test_flags_of_the_http_server_are_refused(stories260k):
    with pytest.raises(TypeError, match=r"port .*nothing"):
        sgl_jax.Engine(model_path=str(stories260k), port=8000)


def test_a_device_that_is_not_there_is_one_line(stories260k):
    with pytest.raises(EngineFailed, match=r"--device tpu.* only cpu"):
        sgl_jax.Engine(model_path=str(stories260k), device="tpu", **SMALL)


@pytest.mark.parametrize(
    ("flag", "options"),
    [
        ("--context-length", {"context_length": 512, "max_total_tokens": 96}),
        ("--max-running-requests", {"max_running_requests": 64, "max_total_tokens": 96}),
    ],
)
def test_a_limit_the_pool_cannot_hold_is_refused(stories260k, flag, options):
    with pytest.raises(EngineFailed, match=rf"{flag} .*\d+.* 96 tokens"):
        sgl_jax.Engine(model_path=str(stories260k), device="cpu", page_size=16, **options)


def test_errors_name_the_arguments_of_python(engine):
    for given in ({}, {"prompt": "a", "input_ids": [5]}):
        with pytest.raises(InvalidParameter, match="give either prompt or input_ids") as error:
            engine.generate(**given)
        assert error.value.param == "prompt"
    with pytest.raises(InvalidParameter, match=r"prompt .*too long|prompt has"):
        engine.generate("word " * 1000)


def test_named_tokens_have_the_probabilities_of_the_models_own_distribution(engine):
    query, items, labels = [1, 300, 301], [[302], [303, 304]], [5, 400, 17, 5, 450, 260]
    body = ScoreRequest(query=query, items=items, label_token_ids=labels)
    state = ServerState(engine._service, engine.server_args)
    found = engine._call(token_scores(state, body, labels, Request({"type": "http"})))
    for item, scores in zip(items, found.scores, strict=True):
        scored = engine.generate(
            input_ids=[[*query, *item, label] for label in labels],
            sampling_params={"max_new_tokens": 1},
            return_logprob=True,
            logprob_start_len=0,
        )
        expected = [math.exp(each["meta_info"]["input_token_logprobs"][-1][0]) for each in scored]
        assert scores == pytest.approx(expected, rel=1e-4)
