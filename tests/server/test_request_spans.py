"""Spans of requests, as a collector on this machine gets them."""

from __future__ import annotations

import importlib.util
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import httpx
import pytest
from live_server import MODEL, LiveServer
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from fakes.fake_core import FakeCore, fake_info
from messages import says
from sgl_jax.engine.messages import PoolingInfo
from sgl_jax.observability import request_tracer
from sgl_jax.observability.request_tracer import RequestSpan, RequestTracer
from sgl_jax.server.lifecycle import serve
from sgl_jax.settings.flag_parser import FlagError
from sgl_jax.settings.server_args import ServerArgs

CHAT = {"model": "stories", "messages": [{"role": "user", "content": "Once upon"}], "max_tokens": 3, "seed": 7}
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Collector:
    """Collector that keeps the spans which it gets."""

    def __init__(self) -> None:
        self.paths: set[str] = set()
        self.spans: list[Span] = []
        self.about: dict[str, Any] = {}
        keep = self._keep

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                keep(self.path, self.rfile.read(int(self.headers["content-length"])))
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None: ...

        self._http = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def _keep(self, path: str, body: bytes) -> None:
        self.paths.add(path)
        for each in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.about = values(each.resource)
            self.spans += [span for scope in each.scope_spans for span in scope.spans]

    def close(self) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()


def values(of: Any) -> dict[str, Any]:
    """Return the attributes of a span, or of a resource."""
    found = {}
    for each in of.attributes:
        kind = each.value.WhichOneof("value")
        value = getattr(each.value, kind)
        found[each.key] = [one.string_value for one in value.values] if kind == "array_value" else value
    return found


@pytest.fixture
def collector() -> Iterator[Collector]:
    found = Collector()
    yield found
    found.close()


def spans_of(collector: Collector, server: LiveServer, *requests: tuple[str, dict, dict[str, str]]) -> list[Span]:
    """Send the requests, end the server, and return the spans that it has sent until then."""
    with server, server.http() as http:
        for path, body, headers in requests:
            http.post(path, json=body, headers=headers)
        http.get("/v1/models")
        http.post("/tokenize", json={"prompt": "Once"})
    return sorted(collector.spans, key=lambda span: span.start_time_unix_nano)


def test_a_chat_leaves_a_span_below_the_clients(collector: Collector) -> None:
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "a=b", "x-request-id": "mine"}
    server = LiveServer(lambda: FakeCore(step_seconds=0.1), otlp_traces_endpoint=collector.url)
    (span,) = spans_of(collector, server, ("/v1/chat/completions", CHAT | {"stream": True}, headers))
    assert collector.paths == {"/v1/traces"}
    assert collector.about["service.name"] == "sgl_jax"
    assert (span.name, span.kind) == ("chat stories", Span.SPAN_KIND_SERVER)
    assert (span.trace_id.hex(), span.parent_span_id.hex(), span.trace_state) == (TRACE, PARENT, "a=b")
    assert span.status.code == 0
    found = values(span)
    seconds = (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9
    first = found.pop("gen_ai.latency.time_to_first_token")
    assert 0.1 <= first <= seconds - 0.1  # three steps of 0.1 s
    assert found.pop("gen_ai.response.time_to_first_chunk") == first
    assert abs(span.end_time_unix_nano / 1e9 - time.time()) < 30
    assert found.pop("gen_ai.usage.input_tokens") > 0
    assert found == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "sgl_jax",
        "gen_ai.request.model": "stories",
        "gen_ai.request.id": "mine",
        "gen_ai.request.stream": True,
        "gen_ai.request.max_tokens": 3,
        "gen_ai.request.temperature": 1.0,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.seed": 7,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.latency.time_in_queue": 0.0,
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
    }


def test_each_way_of_asking_has_its_operation(collector: Collector) -> None:
    native = {"text": "Once", "sampling_params": {"max_new_tokens": 2, "temperature": 0, "n": 2}}
    asked = (
        ("/v1/completions", {"prompt": ["Once", "Twice"], "max_tokens": 2}, {}),
        ("/generate", native, {}),
        ("/v1/responses/", {"input": "Once", "max_output_tokens": 2, "store": False}, {}),
        ("/v1/messages", {"model": "stories", "max_tokens": 2, "messages": CHAT["messages"]}, {}),
    )
    spans = spans_of(collector, LiveServer(otlp_traces_endpoint=f"{collector.url}/here"), *asked)
    assert collector.paths == {"/here"}
    assert [span.name for span in spans] == [f"{kind} stories" for kind in ("text_completion",) * 2 + ("chat",) * 2]
    assert len({span.trace_id for span in spans}) == 4
    assert [len(values(span)["gen_ai.response.finish_reasons"]) for span in spans] == [2, 2, 1, 1]
    assert values(spans[1])["gen_ai.request.choice.count"] == 2
    assert not any("gen_ai.response.time_to_first_chunk" in values(span) for span in spans)


def test_a_clients_mistake_has_a_type_and_is_no_failure_of_the_server(collector: Collector) -> None:
    server = LiveServer(otlp_traces_endpoint=collector.url)
    bad = CHAT | {"temperature": -1}
    unknown, wrong = spans_of(
        collector, server, ("/v1/chat/completions", CHAT | {"model": "none"}, {}), ("/v1/chat/completions", bad, {})
    )
    assert [values(each)["error.type"] for each in (unknown, wrong)] == ["404", "400"]
    assert [each.status.code for each in (unknown, wrong)] == [0, 0]
    assert "gen_ai.usage.input_tokens" not in values(wrong)


def test_what_the_server_fails_on_is_an_error(collector: Collector) -> None:
    class Dying(FakeCore):
        def step(self) -> list:
            if any(row.produced == 2 for row in self._rows.values()):
                raise RuntimeError("no device")
            return super().step()

    server = LiveServer(lambda: Dying(step_seconds=0.05), otlp_traces_endpoint=collector.url)
    streamed, refused = spans_of(
        collector, server, ("/generate", {"text": "Once", "stream": True}, {}), ("/generate", {"text": "Once"}, {})
    )
    assert streamed.status.code == refused.status.code == 2
    assert "no device" in streamed.status.message
    assert values(streamed)["error.type"] == "EngineFailed"
    assert values(streamed)["gen_ai.response.finish_reasons"] == ["abort"]
    assert values(refused)["error.type"] == "500"


def test_embeddings_count_their_input(collector: Collector) -> None:
    info = fake_info(pooling=PoolingInfo("embed", 4))
    server = LiveServer(lambda: FakeCore(info), otlp_traces_endpoint=collector.url)
    (span,) = spans_of(collector, server, ("/v1/embeddings", {"input": [[5, 6], [7]]}, {}))
    assert (span.name, values(span)["gen_ai.usage.input_tokens"]) == ("embeddings stories", 3)


def test_what_a_client_does_not_sample_leaves_no_span(collector: Collector) -> None:
    server = LiveServer(otlp_traces_endpoint=collector.url)
    assert (
        spans_of(collector, server, ("/generate", {"text": "Once"}, {"traceparent": f"00-{TRACE}-{PARENT}-00"})) == []
    )


def test_a_collector_that_is_away_holds_up_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_tracer, "_LAST_WORDS_S", 0.3)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "2")  # seconds, after which its thread ends
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and never answers
        with LiveServer(otlp_traces_endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}") as server:
            began = time.monotonic()
            answer = httpx.post(f"{server.url}/generate", json={"text": "Once"})
        assert answer.status_code == 200
        assert time.monotonic() - began < 10
    for thread in threading.enumerate():  # no other test shall find it trying again
        if thread.name == "sgl-jax-last-spans":
            thread.join(20)
            assert not thread.is_alive()


def test_a_span_belongs_to_no_other_if_traceparent_is_broken(collector: Collector) -> None:
    tracer = RequestTracer(collector.url)
    tracer.record(RequestSpan("chat a", 1, 2, {}, None), {"traceparent": "00-nothing-01"})
    tracer.close()
    assert [(span.parent_span_id, span.start_time_unix_nano) for span in collector.spans] == [(b"", 1)]


def test_a_launch_without_the_packages_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(request_tracer.TracingUnavailable, match=r"--otlp-traces-endpoint .*opentelemetry.sdk"):
        RequestTracer("http://127.0.0.1:4318")
    assert serve(ServerArgs(model_path=MODEL, port=0, otlp_traces_endpoint="http://127.0.0.1:4318")) == 1
    assert says(capsys.readouterr().err, "--otlp-traces-endpoint … sgl-jax[otel]")


@pytest.mark.parametrize("given", ["grpc://127.0.0.1:4317", "127.0.0.1:4318", "http://"])
def test_an_address_that_is_not_of_http_is_refused(given: str) -> None:
    with pytest.raises(FlagError, match=r"--otlp-traces-endpoint .*http.*4318"):
        ServerArgs(model_path=MODEL, otlp_traces_endpoint=given)
