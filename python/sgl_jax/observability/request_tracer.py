"""Spans of requests for an OpenTelemetry collector (docs/features/tracing.md). The packages are imported when a tracer is
made, which only a launch with --otlp-traces-endpoint does."""

from __future__ import annotations

import importlib.util
import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from sgl_jax import __version__

type Value = str | int | float | bool | Sequence[str]

_PACKAGES = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")
_LAST_WORDS_S = 3.0  # for spans that are not sent yet when the server ends


class TracingUnavailable(RuntimeError):
    """Refusal to trace without the packages that send spans."""


@dataclass(frozen=True, slots=True)
class RequestSpan:
    """One request that has ended."""

    name: str
    started_ns: int  # Unix time
    ended_ns: int
    attributes: Mapping[str, Value]
    error: str | None  # why the server failed; None: it did not


def check_installed() -> None:
    """Raise TracingUnavailable if a package is missing."""
    for package in _PACKAGES:
        try:
            found = importlib.util.find_spec(package)
        except ModuleNotFoundError:  # a package around it is missing
            found = None
        if found is None:
            cure = "install the extra: pip install 'sgl-jax[otel]'"
            raise TracingUnavailable(f"--otlp-traces-endpoint needs the package {package}, which is missing; {cure}")


class RequestTracer:
    """Hands spans to a thread, which sends them in batches as OTLP over HTTP.

    The SDK's own variables hold for the rest, as OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER and OTEL_EXPORTER_OTLP_HEADERS. A
    request that says in `traceparent` that it is not sampled leaves no span.
    """

    def __init__(self, endpoint: str):
        """`endpoint`: a URL; one without a path is that of a collector, whose path is /v1/traces. Raises TracingUnavailable."""
        check_installed()
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace import SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        # It logs each failed try with the whole error, several times a minute while a collector is away.
        logging.getLogger("opentelemetry.exporter").setLevel(logging.ERROR)
        if urlsplit(endpoint).path in ("", "/"):
            endpoint = endpoint.rstrip("/") + "/v1/traces"
        about = Resource.create({"service.name": "sgl_jax", "service.version": __version__})
        self._provider = TracerProvider(resource=about.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
        self._tracer = self._provider.get_tracer("sgl_jax", __version__)
        self._parent_in = TraceContextTextMapPropagator().extract
        self._kind, self._failed = SpanKind.SERVER, lambda error: Status(StatusCode.ERROR, error)

    def record(self, span: RequestSpan, headers: Mapping[str, str]) -> None:
        """Queue a span. `headers`: the request's, whose `traceparent` and `tracestate` name the span that it belongs to."""
        made = self._tracer.start_span(
            span.name, self._parent_in(headers), self._kind, span.attributes, start_time=span.started_ns
        )
        if span.error is not None:
            made.set_status(self._failed(span.error))
        made.end(span.ended_ns)

    def close(self) -> None:
        """Send what waits, for at most 3 seconds: a collector may be away."""
        closing = threading.Thread(target=self._provider.shutdown, name="sgl-jax-last-spans", daemon=True)
        closing.start()
        closing.join(_LAST_WORDS_S)
