"""/generate, /tokenize, /detokenize, /abort_request, /flush_cache."""

from __future__ import annotations

import itertools
import json
import threading
import time

import httpx
import pytest
from live_server import LiveServer, tokenizer

from fakes.fake_core import FakeCore
from messages import says
from sgl_jax.engine.messages import Abort, Generate
from sgl_jax.text.tokenizer import load_tokenizer


def events(answer: httpx.Response) -> list[dict]:
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_text(http: httpx.Client) -> None:
    answer = http.post("/generate", json={"text": "Once upon", "rid": "mine"}).json()
    assert answer["text"] == " Once upon"
    assert answer["output_ids"] == [1, 403, 407, 2]
    meta = answer["meta_info"]
    assert meta.pop("e2e_latency") > 0
    assert meta == {
        "id": "mine",
        "finish_reason": {"type": "stop", "matched": 2},
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "cached_tokens": 0,
    }


def test_input_ids_one_or_many(http: httpx.Client) -> None:
    params = {"max_new_tokens": 2}
    one = http.post("/generate", json={"input_ids": [403, 407, 261], "sampling_params": params}).json()
    assert one["output_ids"] == [403, 407]
    assert one["meta_info"]["finish_reason"] == {"type": "length", "length": 2}
    body = {"input_ids": [[403], [407]], "sampling_params": [{"max_new_tokens": 1}, {"max_new_tokens": 2, "n": 2}]}
    many = http.post("/generate", json=body).json()
    assert [answer["output_ids"] for answer in many] == [[403], [407, 2], [407, 2]]


def test_stream_is_cumulative(slow: LiveServer) -> None:
    with slow.http() as http:
        found = events(http.post("/generate", json={"text": "Once upon a time", "stream": True}))
    texts = [answer["text"] for answer in found]
    assert len(texts) > 3
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    assert texts[-1] == " Once upon a time"
    assert found[0]["meta_info"]["finish_reason"] is None
    assert found[-1]["meta_info"]["finish_reason"] == {"type": "stop", "matched": 2}
    assert [answer["meta_info"]["completion_tokens"] for answer in found] == [len(a["output_ids"]) for a in found]


def test_stop_string_is_named(http: httpx.Client) -> None:
    answer = http.post("/generate", json={"text": "Once upon a time", "sampling_params": {"stop": "on a"}}).json()
    assert answer["text"] == " Once up"
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": "on a"}


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_that_is_a_special_token_is_named(http: httpx.Client, stream: bool) -> None:
    body = {"input_ids": [403, 0, 407], "sampling_params": {"stop": ["upon", "<unk>"]}, "stream": stream}
    answer = http.post("/generate", content=json.dumps(body), headers={"Content-Type": "application/json"})
    last = json.loads(answer.text.split("data: ")[-2]) if stream else answer.json()
    assert (last["text"], last["output_ids"]) == (" Once", [403, 0])
    assert last["meta_info"]["finish_reason"] == {"type": "stop", "matched": "<unk>"}


@pytest.mark.parametrize(
    ("path", "body", "prompt_tokens"),
    [
        ("/v1/completions", {"prompt": ""}, 1),
        ("/v1/completions", {"prompt": [""]}, 1),
        ("/v1/completions", {"prompt": ["", ""]}, 2),
        ("/v1/completions", {"prompt": []}, None),
        ("/v1/completions", {"prompt": [[]]}, None),
        ("/generate", {"text": ""}, 1),
        ("/generate", {"input_ids": []}, None),
        ("/generate", {"input_ids": [[]]}, None),
    ],
)
def test_an_empty_text_is_bos_and_no_tokens_are_refused(http, path: str, body: dict, prompt_tokens: int | None) -> None:
    answer = http.post(path, json=body)
    if prompt_tokens is None:
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == next(iter(body))
        return
    found = answer.json()
    assert (found.get("usage") or found["meta_info"])["prompt_tokens"] == prompt_tokens


def test_an_empty_text_is_refused_where_the_tokenizer_adds_no_bos(http, live, tokenizers, monkeypatch) -> None:
    monkeypatch.setattr(live.service, "tokenizer", load_tokenizer(str(tokenizers / "qwen3")))
    for path, field in (("/v1/completions", "prompt"), ("/generate", "text")):
        error = http.post(path, json={field: ""}).json()["error"]
        assert says(error["message"], f"{field} is empty … one token")


@pytest.mark.parametrize(
    ("name", "value"),
    [("lora_id", "a"), ("image_data", ["a"]), ("audio_data", {}), ("video_data", 1), ("return_hidden_states", True)],
)
def test_what_is_not_supported_is_said_so(http: httpx.Client, name: str, value: object) -> None:
    refused = http.post("/generate", json={"text": "a", name: value})
    assert refused.status_code == 400
    found = refused.json()["error"]
    assert (found["param"], found["code"]) == (name, "unsupported_parameter")
    assert found["message"].startswith(f"{name} is not supported")
    assert http.post("/generate", json={"text": "a", name: None}).status_code == 200


@pytest.mark.parametrize("name", ["custom_params", "stop_regex"])
def test_unsupported_sampling_parameters(http: httpx.Client, name: str) -> None:
    for wrap in (lambda params: params, lambda params: [params]):
        refused = http.post("/generate", json={"text": "a", "sampling_params": wrap({name: "a"})})
        assert refused.status_code == 400
        found = refused.json()["error"]
        assert found["code"] == "unsupported_parameter"
        assert found["param"].startswith("sampling_params")
        assert found["param"].endswith(f".{name}")
    assert http.post("/generate", json={"text": "a", "sampling_params": {name: None}}).status_code == 200


def test_stream_interval_joins_the_tokens_of_one_request(http: httpx.Client) -> None:
    def counts(**params: int) -> list[int]:
        body = {"text": "Once upon a time", "stream": True}
        body["sampling_params"] = {"max_new_tokens": 10, "ignore_eos": True} | params
        return [each["meta_info"]["completion_tokens"] for each in events(http.post("/generate", json=body))]

    found = counts(stream_interval=4)
    assert found[-1] == 10
    assert all(later - earlier >= 4 for earlier, later in itertools.pairwise(found[:-1]))
    assert len(found) <= 4  # 1, 5, 9, 10
    assert counts(stream_interval=100)[1:] in ([], [10])
    refused = http.post("/generate", json={"text": "a", "sampling_params": {"stream_interval": 0}})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "sampling_params.stream_interval"


def test_logprobs(http: httpx.Client) -> None:
    body = {"text": "Once upon", "return_logprob": True, "top_logprobs_num": 2, "logprob_start_len": 1}
    body |= {"return_text_in_logprobs": True, "sampling_params": {"max_new_tokens": 1}}
    meta = http.post("/generate", json=body).json()["meta_info"]
    assert meta["input_token_logprobs"] == [[-0.125, 403, " Once"], [-0.25, 407, " upon"]]
    assert meta["output_token_logprobs"] == [[-0.125, 1, "<s>"]]
    assert meta["output_top_logprobs"] == [[[-0.125, 1, "<s>"], [-1.125, 2, "</s>"]]]
    only_output = http.post("/generate", json={"text": "Once upon", "return_logprob": True}).json()["meta_info"]
    assert only_output["input_token_logprobs"] == []
    assert only_output["output_token_logprobs"][0] == [-0.125, 1, None]


def test_zero_new_tokens_score_the_prompt(http: httpx.Client) -> None:
    body = {"text": "Once upon", "return_logprob": True, "logprob_start_len": 0}
    answer = http.post("/generate", json=body | {"sampling_params": {"max_new_tokens": 0}}).json()
    assert answer["text"] == ""
    assert [entry[0] for entry in answer["meta_info"]["input_token_logprobs"]] == [None, -0.125, -0.25]


def test_every_sampling_parameter_reaches_the_engine(live: LiveServer, http: httpx.Client) -> None:
    given = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "presence_penalty": 0.1}
    given |= {"frequency_penalty": 0.2, "repetition_penalty": 1.2, "ignore_eos": True, "skip_special_tokens": False}
    given |= {"disable_speculation": True}
    renamed = {
        "max_new_tokens": 6,
        "min_new_tokens": 3,
        "sampling_seed": 4,
        "logit_bias": {"7": 1.5},
        "stop_token_ids": [8],
    }
    assert http.post("/generate", json={"text": "a", "sampling_params": given | renamed}).status_code == 200
    sent = [command for command in live.core.commands if isinstance(command, Generate)][-1].params
    expected = given | {"max_tokens": 6, "min_tokens": 3, "seed": 4, "logit_bias": {7: 1.5}, "stop_token_ids": (8,)}
    for name, value in expected.items():
        assert getattr(sent, name) == value, name


@pytest.mark.parametrize("how", [{"rid": "long"}, {"abort_all": True}])
def test_abort_request(how: dict) -> None:
    with LiveServer(lambda: FakeCore(step_seconds=0.01)) as server, server.http() as http:
        answers = []
        body = {"text": "a", "rid": "long", "sampling_params": {"max_new_tokens": 400, "ignore_eos": True}}
        thread = threading.Thread(target=lambda: answers.append(httpx.post(f"{server.url}/generate", json=body).json()))
        thread.start()
        while not any(isinstance(command, Generate) for command in server.core.commands):
            time.sleep(0.01)
        assert http.post("/abort_request", json={"rid": "other"}).json() == {"num_aborted": 0}
        assert http.post("/abort_request", json=how).json() == {"num_aborted": 1}
        thread.join(10)
        assert answers[0]["meta_info"]["finish_reason"]["type"] == "abort"
        assert [type(command) for command in server.core.commands] == [Generate, Abort]


def test_two_requests_with_one_id(slow: LiveServer) -> None:
    with slow.http() as http:
        again = http.post("/generate", json={"input_ids": [[5], [6]], "rid": ["same", "same"]})
        assert again.json()["error"]["code"] == "duplicate_request_id"


def test_flush_cache_forgets_prefixes(http: httpx.Client) -> None:
    def cached() -> int:
        return http.post("/generate", json={"text": "flush me"}).json()["meta_info"]["cached_tokens"]

    cached()
    assert cached() > 0
    flushed = http.post("/flush_cache").json()
    assert flushed["success"]
    assert flushed["num_pages"] > 0
    assert cached() == 0


def test_tokenize_and_back(http: httpx.Client) -> None:
    answer = http.post("/tokenize", json={"prompt": "Once upon"}).json()
    assert answer == {"tokens": [1, 403, 407], "count": 3, "max_model_len": 512}
    plain = http.post("/tokenize", json={"prompt": ["Once", "upon"], "add_special_tokens": False}).json()
    assert plain["tokens"] == [[403], [407]]
    assert plain["count"] == [1, 1]
    assert http.post("/detokenize", json={"tokens": [1, 403, 407]}).json() == {"text": "Once upon"}
    with_special = http.post("/detokenize", json={"tokens": [[1, 403], [407]], "skip_special_tokens": False}).json()
    assert with_special == {"text": ["<s> Once", "upon"]}
    spelled = http.post("/tokenize", json={"prompt": ["Once upon"], "return_token_strs": True}).json()
    assert spelled["token_strs"] == [["<s>", " Once", " upon"]]
    spelled = http.post("/tokenize", json={"prompt": "Once upon", "return_token_strs": True}).json()
    assert spelled["token_strs"] == ["<s>", " Once", " upon"]
    assert "token_strs" not in plain
    chat = http.post("/tokenize", json={"messages": [{"role": "user", "content": "Hi"}]}).json()
    assert tokenizer().decode(chat["tokens"]) == "user: Hi\nassistant: "
