"""/openapi.json, and what a fuzzer that reads it finds."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser

import httpx
import hypothesis
import msgspec
import pytest
import schemathesis
from live_server import LiveServer
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from fakes.fake_core import FakeCore, fake_info
from sgl_jax.engine.messages import PoolingInfo

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def fuzzed() -> Iterator[LiveServer]:
    with LiveServer(lambda: FakeCore(fake_info(context_length=64))) as server:
        yield server


MODES = pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["valid", "invalid"])
VECTORS = ("/v1/embeddings", "/classify", "/pooling", "/encode", "/rerank", "/score")


@MODES
def test_no_input_breaks_the_server(fuzzed: LiveServer, mode: GenerationMode) -> None:
    fuzz_all(fuzzed, mode)


@MODES
@pytest.mark.parametrize(
    "pooling",
    [
        PoolingInfo("embed", 8, normalize=True),
        PoolingInfo("classify", 1, labels=["a"], activation="sigmoid"),
        PoolingInfo("score", 2, labels=["no", "yes"], activation="softmax"),
    ],
    ids=["embed", "classify", "score"],
)
def test_no_input_breaks_a_launch_that_makes_vectors(pooling: PoolingInfo, mode: GenerationMode) -> None:
    info = msgspec.structs.replace(fake_info(context_length=256, pooling=pooling), architecture="Qwen3ForCausalLM")
    with LiveServer(lambda: FakeCore(info)) as server:
        fuzz_all(server, mode, VECTORS)


def fuzz_all(server: LiveServer, mode: GenerationMode, paths: Sequence[str] = ()) -> None:
    """Ask for all paths, or for these."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    for found in schema.get_all_operations():
        operation = found.ok()
        if paths and operation.path not in paths:
            continue
        if mode is GenerationMode.NEGATIVE and not list(operation.body):
            continue  # nothing to get wrong

        @hypothesis.settings(
            max_examples=20,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
        def fuzz(case: schemathesis.Case) -> None:
            case.call_and_validate(checks=CHECKS, timeout=60)

        fuzz()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/messages", {"model": "stories", "messages": [{"role": "user", "content": "a"}], "max_tokens": 4}),
        ("/v1/responses", {"input": "a", "max_output_tokens": 4}),
        ("/generate", {"text": "a", "sampling_params": {"max_new_tokens": 4}}),
    ],
)
def test_streams_are_as_documented(fuzzed: LiveServer, path: str, body: dict) -> None:
    operation = schemathesis.openapi.from_url(f"{fuzzed.url}/openapi.json")[path]["POST"]
    case = operation.Case(body=body | {"stream": True}, media_type="application/json")
    answer = case.call_and_validate(checks=CHECKS, timeout=60)
    assert answer.headers["content-type"][0].startswith("text/event-stream")


def test_only_paths_that_stream_promise_events(http: httpx.Client) -> None:
    paths = http.get("/openapi.json").json()["paths"]
    answers = {path: each["post"]["responses"] for path, each in paths.items() if "post" in each}
    streaming = {path for path, each in answers.items() if "text/event-stream" in each["200"]["content"]}
    assert streaming == {"/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses", "/generate"}
    assert all("429" in answers[path] for path in VECTORS)


def test_every_path_of_the_product_is_documented(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    assert set(document["paths"]) == {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/responses",
        "/v1/responses/{response_id}",
        "/v1/responses/{response_id}/cancel",
        "/v1/responses/{response_id}/input_items",
        "/v1/embeddings",
        "/classify",
        "/pooling",
        "/encode",
        "/rerank",
        "/v1/rerank",
        "/v2/rerank",
        "/score",
        "/v1/score",
        "/v1/models",
        "/v1/models/{model}",
        "/generate",
        "/tokenize",
        "/detokenize",
        "/abort_request",
        "/flush_cache",
        "/start_profile",
        "/stop_profile",
        "/profile_status",
        "/health",
        "/ready",
        "/ping",
        "/load",
        "/get_load",
        "/tokenizer_info",
        "/health_generate",
        "/get_model_info",
        "/get_server_info",
        "/version",
        "/metrics",
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/load_lora_adapter",
        "/unload_lora_adapter",
        "/pause_generation",
        "/continue_generation",
        "/update_weights_from_disk",
        "/release_memory_occupation",
        "/resume_memory_occupation",
    }
    chat = document["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert set(chat) == {"200", "400", "401", "403", "404", "413", "415", "429", "500", "503"}
    assert set(chat["200"]["content"]) == {"application/json", "text/event-stream"}
    assert document["components"]["schemas"]["ChatCompletionRequest"]["additionalProperties"] is False


def test_an_answer_of_generate_is_an_object_or_a_list(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    schema = document["paths"]["/generate"]["post"]["responses"]["200"]["content"]["application/json"]["schema"]
    one = {"$ref": "#/components/schemas/GenerateAnswer"}
    assert schema == {"anyOf": [one, {"type": "array", "items": one}]}


def test_a_switch_that_is_off_is_false_and_not_0(http: httpx.Client) -> None:
    answer = http.post("/start_profile", json={"with_stack": 0})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "with_stack")


class _Page(HTMLParser):
    """Notes the tags of a page, the addresses in it, and its text."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: set[str] = set()
        self.addresses: set[str] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.text += " "
        self.addresses |= {value or "" for name, value in attrs if name in ("href", "src", "action", "srcset", "style")}

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_of_documentation_needs_nothing_from_elsewhere_and_has_every_path_and_field(
    http: httpx.Client,
) -> None:
    answer = http.get("/docs")
    assert answer.headers["content-type"].startswith("text/html")
    assert answer.headers["content-security-policy"].startswith("default-src 'none';")
    page, document = _Page(answer.text), http.get("/openapi.json").json()
    assert page.tags.isdisjoint({"script", "iframe", "img", "object", "form"})
    assert page.addresses == {"data:,", "openapi.json"}
    words = set(re.findall(r"[\w/{}]+", page.text))
    for path, methods in document["paths"].items():
        assert path in words
        assert {method.upper() for method in methods} <= words
    for name in (
        "ChatCompletionRequest",
        "CompletionRequest",
        "GenerateRequest",
        "AbortRequest",
        "StartProfileRequest",
    ):
        assert set(document["components"]["schemas"][name]["properties"]) <= words
    assert http.get("/redoc").status_code == 404
