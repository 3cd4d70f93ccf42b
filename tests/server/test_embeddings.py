"""Embeddings, labels and scores over HTTP, of a fake engine whose vectors are known."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import msgspec
import numpy as np
import openai
import pytest
from live_server import LiveServer, tokenizer

from fakes.fake_core import FakeCore, fake_info, fake_vector
from messages import says
from sgl_jax.engine.messages import EngineInfo, PoolingInfo
from sgl_jax.engine.pooled_results import embedding, probabilities

EMBEDS = PoolingInfo("embed", 8, normalize=True, prompts={"query": "Query: ", "plain": ""})
LABELS = PoolingInfo("classify", 3, labels=["bad", "fair", "good"], activation="softmax")
REWARD = PoolingInfo("classify", 1, labels=["LABEL_0"], activation="sigmoid")
SCORES = PoolingInfo("score", 2, labels=["no", "yes"], activation="softmax")
TEXTS = ["Once upon a time", "there was", "a dog"]


def launch(pooling: PoolingInfo | None, architecture: str = "FakeForCausalLM", **args: Any) -> LiveServer:
    info: Callable[[], EngineInfo] = lambda: msgspec.structs.replace(  # noqa: E731
        fake_info(pooling=pooling, adapters=["pirate"]), architecture=architecture
    )
    return LiveServer(lambda: FakeCore(info()), **args)


@pytest.fixture(scope="module")
def live() -> Iterator[LiveServer]:
    with launch(EMBEDS) as server:
        yield server


@pytest.fixture(scope="module")
def labels() -> Iterator[httpx.Client]:
    with launch(LABELS) as server, server.http() as client:
        yield client


@pytest.fixture(scope="module")
def reward() -> Iterator[httpx.Client]:
    with launch(REWARD) as server, server.http() as client:
        yield client


@pytest.fixture(scope="module")
def reranker() -> Iterator[httpx.Client]:
    with launch(SCORES, "Qwen3ForCausalLM") as server, server.http() as client:
        yield client


def vector(ids: list[int], pooling: PoolingInfo = EMBEDS) -> np.ndarray:
    return np.array(fake_vector(ids, pooling.size), np.float32)


def embedded(text: str | list[int], dimensions: int | None = None) -> list[float]:
    ids = tokenizer().encode(text) if isinstance(text, str) else text
    return embedding(vector(ids), EMBEDS, dimensions).tolist()


def test_openais_client_gets_vectors_in_both_encodings(client: openai.OpenAI) -> None:
    plain = client.embeddings.create(model="stories", input=TEXTS, encoding_format="float")
    packed = client.embeddings.create(model="stories", input=TEXTS)  # the client asks for base64
    assert [each.embedding for each in plain.data] == [embedded(text) for text in TEXTS]
    assert [each.index for each in packed.data] == [0, 1, 2]
    for one, other in zip(plain.data, packed.data, strict=True):
        np.testing.assert_array_equal(one.embedding, other.embedding)
    num_tokens = sum(len(tokenizer().encode(text)) for text in TEXTS)
    assert plain.usage.prompt_tokens == plain.usage.total_tokens == num_tokens
    cut = client.embeddings.create(model="default", input=TEXTS[0], dimensions=3)
    np.testing.assert_allclose(cut.data[0].embedding, embedded(TEXTS[0], 3), rtol=1e-6)
    assert np.linalg.norm(cut.data[0].embedding) == pytest.approx(1)


def test_base64_is_float32_little_endian(http: httpx.Client) -> None:
    found = http.post("/v1/embeddings", json={"input": "a", "encoding_format": "base64"}).json()
    data = base64.b64decode(found["data"][0]["embedding"])
    np.testing.assert_array_equal(np.frombuffer(data, "<f4"), np.float32(embedded("a")))
    assert (found["object"], found["model"]) == ("list", "stories")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([5, 6, 7], [[5, 6, 7]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
        ("a", ["a"]),
        (["a"], ["a"]),
    ],
)
def test_an_input_is_a_text_or_ids_or_a_list_of_either(http: httpx.Client, given: Any, expected: list[Any]) -> None:
    found = http.post("/v1/embeddings", json={"input": given, "user": "u"}).json()
    assert [each["embedding"] for each in found["data"]] == [embedded(each) for each in expected]


def embed(http: httpx.Client, **body: Any) -> list[float]:
    answer = http.post("/v1/embeddings", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["data"][0]["embedding"]


def test_options_of_vllm_and_of_sentence_transformers(http: httpx.Client, live: LiveServer) -> None:
    raw = vector(tokenizer().encode("a")).tolist()
    assert embed(http, input="a", normalize=False) == embed(http, input="a", use_activation=False) == raw
    bare = tokenizer().encode("a", add_special_tokens=False)
    assert embed(http, input="a", add_special_tokens=False) == embedded(bare)
    assert embed(http, input="a", prompt_name="query") == embedded("Query: a")
    messages = [{"role": "user", "content": "Hello"}]
    rendered = http.post("/tokenize", json={"messages": messages, "add_generation_prompt": False}).json()["tokens"]
    assert embed(http, messages=messages) == embedded(rendered)
    with_prompt = http.post("/tokenize", json={"messages": messages}).json()["tokens"]
    assert embed(http, messages=messages, add_generation_prompt=True) == embedded(with_prompt)
    assert embed(http, input="a", model="pirate") == embedded("a")
    assert live.core.commands[-1].adapter == 1
    embed(http, input="a", cache_salt="s", rid="mine")
    assert live.core.commands[-1].namespace.endswith("s")


def test_inputs_are_cut_between_their_special_tokens(http: httpx.Client) -> None:
    ids = tokenizer().encode(TEXTS[0])
    assert (ids[0], len(ids) > 4) == (1, True)
    assert embed(http, input=TEXTS[0], truncate_prompt_tokens=3) == embedded(ids[:3])
    left = embed(http, input=TEXTS[0], truncate_prompt_tokens=3, truncation_side="left")
    assert left == embedded([1, *ids[-2:]])
    assert embed(http, input=[*range(5, 15)], truncate_prompt_tokens=4) == embedded([5, 6, 7, 8])
    assert embed(http, input=TEXTS[0], truncate_prompt_tokens=500) == embedded(TEXTS[0])
    assert embed(http, input="word " * 5000, truncate_prompt_tokens=-1)
    long = http.post("/v1/embeddings", json={"input": ["a", "word " * 600]})
    assert (long.status_code, long.json()["error"]["param"]) == (400, "input[1]")
    assert long.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({}, "input", "input"),
        ({"input": ""}, "input", "input … empty"),
        ({"input": []}, "input", "input … empty"),
        ({"input": ["a", ""]}, "input[1]", "input[1] … empty"),
        ({"input": [[5], []]}, "input[1]", "input[1] … empty"),
        ({"input": [[5], [512]]}, "input[1]", "input[1] … 512"),
        ({"input": ["a"] * 2049}, "input", "2049 … 2048"),
        ({"input": "a", "messages": [{"role": "user", "content": "a"}]}, "input", "input or messages"),
        ({"input": "a", "dimensions": 9}, "dimensions", "9 … 8"),
        ({"input": "a", "dimensions": 0}, "dimensions", "0 … 8"),
        ({"input": "a", "encoding_format": "bytes"}, "encoding_format", "encoding_format"),
        ({"input": "a", "embed_dtype": "float16"}, "embed_dtype", "embed_dtype"),
        ({"input": "a", "priority": 1}, "priority", "1 … --schedule-policy priority"),
        ({"input": "a", "truncation_side": "left"}, "truncation_side", "truncate_prompt_tokens"),
        ({"input": [5], "add_special_tokens": True}, "add_special_tokens", "ids"),
        ({"input": [[5]], "add_special_tokens": False}, "add_special_tokens", "ids"),
        ({"input": [5], "prompt_name": "query"}, "prompt_name", "text"),
        ({"input": [[5]], "prompt_name": "query"}, "prompt_name", "text"),
        ({"messages": [{"role": "user", "content": "a"}], "prompt_name": "query"}, "prompt_name", "text"),
        ({"input": "a", "normalize": True, "use_activation": False}, "normalize", "differ"),
        ({"input": "a", "prompt_name": "code"}, "prompt_name", "code … query, plain"),
        ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "0"),
        ({"input": "a", "add_generation_prompt": True}, "add_generation_prompt", "messages"),
        ({"input": "a", "nonsense": 1}, "nonsense", "nonsense"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(http: httpx.Client, body: Any, param: str, said: str) -> None:
    answer = http.post("/v1/embeddings", json=body)
    found = answer.json()["error"]
    assert (answer.status_code, found["param"]) == (400, param), found
    assert says(found["message"], said), found["message"]


def test_a_model_that_is_not_served_is_not_found(http: httpx.Client) -> None:
    for path, body in (("/v1/embeddings", {"input": "a"}), ("/v1/rerank", {"query": "a", "documents": ["b"]})):
        assert http.post(path, json=body | {"model": "other"}).json()["error"]["code"] == "model_not_found"


ALL = [
    ("/v1/embeddings", {"input": "a"}),
    ("/classify", {"input": "a"}),
    ("/rerank", {"query": "a", "documents": ["b"]}),
    ("/v1/score", {"text_1": "a", "text_2": "b"}),
    ("/pooling", {"input": "a"}),
    ("/encode", {"text": "a"}),
    ("/v1/completions", {"prompt": "a"}),
]


@pytest.mark.parametrize(
    ("pooling", "taken"),
    [
        (None, {"/v1/completions"}),
        (EMBEDS, {"/v1/embeddings", "/rerank", "/v1/score", "/encode", "/pooling"}),
        (LABELS, {"/classify", "/encode", "/pooling"}),
        (REWARD, {"/classify", "/rerank", "/v1/score", "/encode", "/pooling"}),
    ],
)
def test_a_path_that_the_launch_cannot_answer_names_the_flag(pooling: PoolingInfo | None, taken: set[str]) -> None:
    with launch(pooling) as server, server.http() as http:
        answers = {path: http.post(path, json=body) for path, body in ALL}
    assert {path for path, each in answers.items() if each.status_code == 200} == taken
    for path in answers.keys() - taken:
        found = answers[path].json()["error"]
        assert (answers[path].status_code, found["param"]) == (400, "model")
        assert says(found["message"], "--task")


@pytest.mark.parametrize("template", [None, "{{ raise_exception('no chats') }}"])
def test_a_chat_with_a_launch_that_makes_vectors_names_the_flag(template: str | None) -> None:
    chat = {"model": "stories", "messages": [{"role": "user", "content": "a"}]}
    asked: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": chat,
        "/v1/responses": {"input": "a"},
        "/v1/messages": chat | {"max_tokens": 1},
        "/v1/messages/count_tokens": chat,
        "/v1/completions": {"prompt": "word " * 5000},
    }
    with launch(EMBEDS, chat_template=template) as server, server.http() as http:
        for path, body in asked.items():
            answer = http.post(path, json=body)
            assert answer.status_code == 400, path
            assert says(answer.json()["error"]["message"], "--task embed … --task generate"), path


def test_a_vector_that_is_not_finite_is_a_server_error_of_its_input(monkeypatch: pytest.MonkeyPatch) -> None:
    with launch(EMBEDS) as server, server.http() as http:
        monkeypatch.setattr("fakes.fake_core.fake_vector", lambda ids, size: [float("nan")] * size)
        for path, body, param in (
            ("/v1/embeddings", {"input": ["a", "b"]}, "input[0]"),
            ("/rerank", {"query": "a", "documents": ["b"]}, "query"),
            ("/encode", {"text": "a"}, "text"),
        ):
            answer = http.post(path, json=body)
            found = answer.json()["error"]
            assert (answer.status_code, found["type"], found["param"]) == (500, "server_error", param)
            assert says(found["message"], f"8 … {param}")


def test_labels_and_rewards(labels: httpx.Client, reward: httpx.Client) -> None:
    found = labels.post("/classify", json={"input": TEXTS, "model": "stories"}).json()
    for i, (text, each) in enumerate(zip(TEXTS, found["data"], strict=True)):
        probs = probabilities(vector(tokenizer().encode(text), LABELS), LABELS).tolist()
        label = LABELS.labels[int(np.argmax(probs))]
        assert each == {"index": i, "label": label, "probs": probs, "num_classes": 3}
    assert found["usage"]["total_tokens"] == sum(len(tokenizer().encode(text)) for text in TEXTS)
    raw = vector(tokenizer().encode("a"), REWARD)
    for more, value in (({}, probabilities(raw, REWARD)), ({"use_activation": False}, raw)):
        [each] = reward.post("/classify", json={"input": "a"} | more).json()["data"]
        assert each == {"index": 0, "label": "LABEL_0", "probs": value.tolist(), "num_classes": 1}
    talk = reward.post("/classify", json={"messages": [{"role": "user", "content": "Hello"}]})
    assert talk.json()["usage"]["prompt_tokens"] > 1


def test_the_native_path(http: httpx.Client, labels: httpx.Client) -> None:
    one = http.post("/encode", json={"text": "a", "rid": "mine"}).json()
    assert one["embedding"] == embedded("a")
    assert (one["meta_info"]["id"], one["meta_info"]["prompt_tokens"]) == ("mine", len(tokenizer().encode("a")))
    several = http.post("/encode", json={"input_ids": [[5], [6]]}).json()
    assert [each["embedding"] for each in several] == [embedded([5]), embedded([6])]
    assert len({each["meta_info"]["id"] for each in several}) == 2
    assert set(labels.post("/encode", json={"text": "a"}).json()) == {"logits", "probs", "label", "labels", "meta_info"}
    for body, param in (({}, "text"), ({"text": "a", "image_data": "x"}, "image_data"), ({"text": []}, "text")):
        assert http.post("/encode", json=body).json()["error"]["param"] == param


def test_vllms_path_answers_with_the_vector_of_any_launch(
    http: httpx.Client, labels: httpx.Client, reranker: httpx.Client
) -> None:
    found = http.post("/pooling", json={"input": TEXTS, "task": "embed"}).json()
    assert [each["data"] for each in found["data"]] == [embedded(text) for text in TEXTS]
    assert [(each["index"], each["object"]) for each in found["data"]] == [(i, "pooling") for i in range(3)]
    assert (found["object"], found["model"], found["id"][:5]) == ("list", "stories", "pool-")
    assert found["usage"]["prompt_tokens"] == sum(len(tokenizer().encode(text)) for text in TEXTS)
    plain = http.post("/pooling", json={"input": [5, 6], "use_activation": False}).json()["data"][0]["data"]
    assert plain == vector([5, 6]).tolist()
    packed = http.post("/pooling", json={"input": [5, 6], "dimensions": 3, "encoding_format": "base64"}).json()
    assert np.frombuffer(base64.b64decode(packed["data"][0]["data"]), "<f4").tolist() == embedded([5, 6], 3)
    raw = vector([5, 6], LABELS)
    for wanted, expected in ((None, probabilities(raw, LABELS)), (False, raw)):
        answer = labels.post("/pooling", json={"input": [5, 6], "use_activation": wanted}).json()
        assert answer["data"][0]["data"] == expected.tolist()
    no, yes = vector([5, 6], SCORES).tolist()
    [score] = reranker.post("/pooling", json={"input": [5, 6]}).json()["data"][0]["data"]
    assert score == pytest.approx(1 / (1 + np.exp(no - yes)))


def test_long_texts_are_encoded_in_a_thread(live: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, threads = live.service.tokenizer, []
    encode = tokens.encode
    watched = lambda *given: (threads.append(threading.current_thread().name), encode(*given))[1]  # noqa: E731
    monkeypatch.setattr(type(tokens), "encode", lambda self, *given: watched(*given))
    with live.http() as client:
        assert client.post("/encode", json={"text": "a" * 4001}).status_code == 400
        assert client.post("/encode", json={"text": ["a"]}).status_code == 200
    assert threads[0].startswith("sgl-jax-text")
    assert not threads[-1].startswith("sgl-jax-text")


def cosine(one: str, other: str) -> float:
    return float(np.dot(np.float32(embedded(one)), np.float32(embedded(other))))


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_documents_are_ranked_by_cosine(http: httpx.Client, path: str) -> None:
    asked = {"model": "stories", "query": "dog", "documents": [TEXTS[0], {"text": TEXTS[1]}, TEXTS[2]]}
    found = http.post(path, json=asked).json()
    scores = {i: cosine("dog", text) for i, text in enumerate(TEXTS)}
    assert [each["index"] for each in found["results"]] == sorted(scores, key=lambda i: -scores[i])
    for each in found["results"]:
        assert each["relevance_score"] == pytest.approx(scores[each["index"]], abs=1e-6)
        assert each["document"] == {"text": TEXTS[each["index"]]}
    assert found["usage"]["total_tokens"] == sum(len(tokenizer().encode(text)) for text in ["dog", *TEXTS])
    best = http.post(path, json=asked | {"top_n": 1, "return_documents": False}).json()["results"]
    assert best == [{name: found["results"][0][name] for name in ("index", "relevance_score")}]
    assert len(http.post(path, json=asked | {"top_n": 9}).json()["results"]) == 3


def qwen3(query: str, document: str, instruction: str) -> list[int]:
    text = (
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct provided. "
        'Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
        f"<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    return tokenizer().encode(text, add_special_tokens=False)


def test_a_reranker_reads_pairs_in_its_template(reranker: httpx.Client) -> None:
    usual = "Given a web search query, retrieve relevant passages that answer the query"
    for more, instruction in (({}, usual), ({"instruction": "Find {it}"}, "Find {it}"), ({"instruct": "x"}, "x")):
        body = {"query": "do{g}", "documents": TEXTS, **more}
        results = reranker.post("/v1/rerank", json=body).json()["results"]
        raw = {i: vector(qwen3("do{g}", text, instruction), SCORES) for i, text in enumerate(TEXTS)}
        expected = {i: float(probabilities(each, SCORES)[1]) for i, each in raw.items()}
        assert {each["index"]: each["relevance_score"] for each in results} == pytest.approx(expected)
    body |= {"use_activation": False}
    results = reranker.post("/v1/rerank", json=body).json()["results"]
    assert {each["index"]: each["relevance_score"] for each in results} == {i: v[1] - v[0] for i, v in raw.items()}


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'query' %}Q:{{ m.content }}{% elif m.role == \"document\" %}D:{{ m.content }}"
    "{% else %}{{ m.role }}:{{ m.content }}{% endif %}|{% endfor %}"
)


def test_a_template_with_the_roles_of_a_pair_is_taken() -> None:
    with launch(SCORES, "Qwen3ForCausalLM", chat_template=TEMPLATE) as server, server.http() as http:
        found = http.post("/score", json={"text_1": "q", "text_2": "d", "instruction": "i"}).json()
        ids = tokenizer().encode("system:i|Q:q|D:d|", add_special_tokens=False)
        assert server.core.commands[-1].prompt_ids == ids
        assert found["usage"]["prompt_tokens"] == len(ids)


def test_a_classifier_without_a_template_reads_two_texts_and_a_scorer_is_refused(reward: httpx.Client) -> None:
    joined = vector(tokenizer().encode_pair("q", "d"), REWARD)
    body = {"queries": "q", "documents": ["d"], "use_activation": False}
    assert reward.post("/score", json=body).json()["data"][0]["score"] == joined[0]
    refused = reward.post("/score", json=body | {"instruction": "i"}).json()["error"]
    assert refused["param"] == "instruction"
    with launch(SCORES) as server, server.http() as http:
        answer = http.post("/rerank", json={"query": "q", "documents": ["d"]})
        assert answer.status_code == 400
        assert says(answer.json()["error"]["message"], "template … --chat-template")


@pytest.mark.parametrize("path", ["/score", "/v1/score"])
def test_pairs_are_scored_in_their_order(http: httpx.Client, path: str) -> None:
    for first, second in (("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2")):
        found = http.post(path, json={first: "dog", second: TEXTS}).json()
        assert [each["score"] for each in found["data"]] == pytest.approx([cosine("dog", t) for t in TEXTS], abs=1e-6)
    pairs = http.post(path, json={"text_1": TEXTS, "text_2": TEXTS[::-1]}).json()["data"]
    expected = [cosine(a, b) for a, b in zip(TEXTS, TEXTS[::-1], strict=True)]
    assert [each["score"] for each in pairs] == pytest.approx(expected, abs=1e-6)
    assert [(each["index"], each["object"]) for each in pairs] == [(i, "score") for i in range(3)]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/score", {"query": "a", "items": ["b"]}, "query"),
        ("/v1/score", {"queries": "a", "items": ["b"], "label_token_ids": [1]}, "label_token_ids"),
        ("/v1/score", {"queries": "a", "items": ["b"], "apply_softmax": True}, "apply_softmax"),
        ("/v1/score", {"text_1": "a", "text_2": "b", "item_first": True}, "item_first"),
        ("/v1/score", {"text_1": "a", "items": [[5]]}, "items"),
        ("/pooling", {"input": "a", "task": "classify"}, "task"),
        ("/pooling", {"input": "a", "task": "token_embed"}, "task"),
        ("/pooling", {"input": "a", "dimensions": 9}, "dimensions"),
        ("/pooling", {"input": "a", "mm_processor_kwargs": {}}, "mm_processor_kwargs"),
        ("/v1/score", {"text_1": "a"}, "text_2"),
        ("/v1/score", {"text_1": "a", "queries": "b", "text_2": "c"}, "text_1"),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": ["c"]}, "text_1"),
        ("/v1/score", {"text_1": "a", "text_2": ["c", ""]}, "text_2[1]"),
        ("/v1/score", {"text_1": "a", "text_2": "b", "truncate_prompt_tokens": 3}, "truncate_prompt_tokens"),
        ("/rerank", {"query": "a"}, "documents"),
        ("/rerank", {"query": "a", "documents": []}, "documents"),
        ("/rerank", {"query": "", "documents": ["a"]}, "query"),
        ("/rerank", {"query": "a", "documents": ["a", ""]}, "documents[1]"),
        ("/rerank", {"query": "a", "documents": ["a", "word " * 600]}, "documents[1]"),
        ("/rerank", {"query": "a", "documents": ["a"], "top_n": -1}, "top_n"),
        ("/rerank", {"query": "a", "documents": ["a"], "rank_fields": ["b"]}, "rank_fields"),
        ("/rerank", {"query": "a", "documents": ["a"], "instruction": "b"}, "instruction"),
        ("/rerank", {"query": "a", "documents": ["a"], "instruct": "b"}, "instruct"),
        ("/rerank", {"query": "a", "documents": ["a"], "use_activation": False}, "use_activation"),
        ("/v1/score", {"text_1": "a", "text_2": "b", "use_activation": True}, "use_activation"),
        ("/encode", {"text": ""}, "text"),
        ("/encode", {"text": ["a", ""]}, "text[1]"),
        ("/encode", {"text": "a", "dimensions": 9}, "dimensions"),
        ("/rerank", {"query": "a", "documents": [{"text": "a", "title": "b"}]}, "documents[0].title"),
    ],
)
def test_what_cannot_be_scored_or_encoded_is_refused_by_name(
    http: httpx.Client, path: str, body: Any, param: str
) -> None:
    answer = http.post(path, json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


def test_errors_of_a_pair_name_their_side(reranker: httpx.Client, reward: httpx.Client) -> None:
    def refused(client: httpx.Client, body: dict[str, Any], path: str = "/rerank") -> dict[str, Any]:
        answer = client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
        assert answer.status_code == 400, answer.text
        return answer.json()["error"]

    bad, long = "\ud800", "word " * 150  # two of these are too long
    for client in (reranker, reward):
        assert refused(client, {"query": bad, "documents": ["a"]})["param"] == "query"
        assert refused(client, {"query": "a", "documents": ["a", bad]})["param"] == "documents[1]"
        pairs = {"queries": ["a", bad], "items": ["a", "b"]}
        assert refused(client, pairs, "/score")["param"] == "queries[1]"
        for query, documents in ((long, [long]), ("a", ["a", "word " * 5000]), ("word " * 600, ["a"])):
            found = refused(client, {"query": query, "documents": documents})
            assert found["code"] == "context_length_exceeded"
            place = f"documents[{len(documents) - 1}]"
            assert found["param"] == place
            assert says(found["message"], f"too long … query and {place} together … tokens")
    for name in ("instruction", "instruct"):
        assert refused(reranker, {"query": "a", "documents": ["a"], name: bad})["param"] == name


def test_more_inputs_than_the_queue_takes_are_refused_by_their_field() -> None:
    with launch(EMBEDS, max_queued_requests=3) as server, server.http() as http:
        for path, body, field, count in (
            ("/v1/embeddings", {"input": ["a"] * 4}, "input", 4),
            ("/rerank", {"query": "a", "documents": ["b"] * 3}, "documents", 4),
            ("/encode", {"text": ["a"] * 5}, "text", 5),
            ("/encode", {"input_ids": [[5]] * 5}, "input_ids", 5),
        ):
            found = http.post(path, json=body).json()["error"]
            assert found["param"] == field, path
            of_both = "query and " if path == "/rerank" else ""
            assert says(found["message"], f"{of_both}{field} … {count} … 3 … --max-queued-requests")
            assert not says(found["message"], "n"), path


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", {"input": "\ud800"}),
        ("/v1/embeddings", {"input": "a", "rid": "\ud800"}),
        ("/v1/embeddings", {"input": "a", "cache_salt": "\ud800"}),
        ("/v1/embeddings", {"input": "a", "prompt_name": "\ud800"}),
        ("/v1/embeddings", {"messages": [{"role": "user", "content": "\ud800"}]}),
        ("/encode", {"text": "a", "rid": "\ud800"}),
        ("/rerank", {"query": "a", "documents": ["\ud800"]}),
        ("/rerank", {"query": "\ud800", "documents": ["a"]}),
        ("/score", {"text_1": "a", "text_2": "\ud800"}),
    ],
)
def test_lone_surrogates_break_nothing(
    http: httpx.Client, reranker: httpx.Client, reward: httpx.Client, path: str, body: dict[str, Any]
) -> None:
    for client in (http, reranker, reward):
        answer = client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
        assert answer.status_code == 400, answer.text


def test_a_launch_that_makes_vectors_says_so(http: httpx.Client) -> None:
    assert http.get("/get_model_info").json()["is_generation"] is False
    assert http.get("/health_generate").status_code == 200


def test_vectors_need_the_key_and_a_server_that_is_ready() -> None:
    with launch(EMBEDS, api_key="k", open_service=False) as server, server.http() as http:
        for path, body in ALL:
            assert http.post(path, json=body).status_code == 401
            starting = http.post(path, json=body, headers={"Authorization": "Bearer k"})
            assert (starting.status_code, starting.json()["error"]["code"]) == (503, "not_ready")


def test_log_lines_count_the_tokens_of_vectors(http: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "sgl_jax.server.edge")
    asked = {
        "/v1/embeddings": {"input": [[5, 6], [7]], "model": "pirate"},
        "/score": {"text_1": "dog", "text_2": TEXTS},
    }
    numbers = [http.post(path, json=body).json()["usage"]["prompt_tokens"] for path, body in asked.items()]
    http.post("/encode", json={"input_ids": [[5, 6], [7]], "lora_path": [None, "pirate"]})
    http.post("/encode", json={"input_ids": [5, 6, 7, 8]})
    wanted = [f"{numbers[0]}+0 tokens adapter=pirate", f"{numbers[1]}+0 tokens"]
    wanted += ["3+0 tokens adapter=pirate", "4+0 tokens"]
    while len(lines := [line for line in caplog.messages if "POST" in line]) < len(wanted):
        time.sleep(0.005)  # a line follows its answer
    for line, text in zip(lines, wanted, strict=True):
        assert text in line


def test_a_regression_has_no_activation() -> None:
    regression = PoolingInfo("classify", 1, labels=["LABEL_0"], activation="none")
    with launch(regression) as server, server.http() as client:
        answer = client.post("/classify", json={"input": "a", "use_activation": True})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "use_activation")
        plain, without = (
            client.post("/classify", json={"input": "a"} | more).json()["data"]
            for more in ({}, {"use_activation": False})
        )
        assert plain == without
