"""/openapi.json, and what a fuzzer that reads it finds."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import hypothesis
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

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def fuzzed() -> Iterator[LiveServer]:
    with LiveServer(lambda: FakeCore(fake_info(context_length=64))) as server:
        yield server


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["valid", "invalid"])
def test_no_input_breaks_the_server(fuzzed: LiveServer, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_url(f"{fuzzed.url}/openapi.json")
    for found in schema.get_all_operations():
        operation = found.ok()
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
        ("/generate", {"text": "a", "sampling_params": {"max_new_tokens": 4}}),
    ],
)
def test_streams_are_as_documented(fuzzed: LiveServer, path: str, body: dict) -> None:
    operation = schemathesis.openapi.from_url(f"{fuzzed.url}/openapi.json")[path]["POST"]
    case = operation.Case(body=body | {"stream": True}, media_type="application/json")
    answer = case.call_and_validate(checks=CHECKS, timeout=60)
    assert answer.headers["content-type"][0].startswith("text/event-stream")


def test_every_path_of_the_product_is_documented(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    assert set(document["paths"]) == {
        "/v1/chat/completions",
        "/v1/completions",
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
        "/health_generate",
        "/get_model_info",
        "/get_server_info",
        "/version",
        "/metrics",
    }
    chat = document["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert set(chat) == {"200", "400", "401", "404", "429", "500", "503"}
    assert set(chat["200"]["content"]) == {"application/json", "text/event-stream"}
    assert document["components"]["schemas"]["ChatCompletionRequest"]["additionalProperties"] is False


def test_docs_page(http: httpx.Client) -> None:
    assert "swagger" in http.get("/docs").text
