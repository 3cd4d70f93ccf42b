"""Spans of requests: OpenTelemetry's attributes for generative AI, with vLLM's names for times that it has none for."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import Scope

from sgl_jax.engine.generation import Generation
from sgl_jax.observability.request_tracer import RequestSpan, RequestTracer, Value

OPERATIONS = {  # gen_ai.operation.name by path; other requests leave no span
    "/v1/chat/completions": "chat",
    "/v1/messages": "chat",
    "/v1/responses": "chat",
    "/v1/completions": "text_completion",
    "/generate": "text_completion",
    "/v1/embeddings": "embeddings",
    "/encode": "embeddings",
    "/pooling": "embeddings",
    "/classify": "classify",
    "/rerank": "rerank",
    "/v1/rerank": "rerank",
    "/v2/rerank": "rerank",
    "/score": "score",
    "/v1/score": "score",
}


@dataclass(frozen=True)
class RequestSpans:
    """Makes a span of each request that generates text or vectors, and gives it to the tracer."""

    tracer: RequestTracer
    model_name: str

    def record(self, scope: Scope, status: int, seconds: float) -> None:
        """Record a request that was answered with `status` just now, `seconds` after it came."""
        operation = OPERATIONS.get(scope["path"].rstrip("/"))
        if operation is None or scope["method"] != "POST":
            return
        seen, ended = scope["state"], time.time_ns()
        generation: Generation | None = seen.get("generation")
        adapters = seen.get("adapters", ()) if generation is None else generation.adapters
        model = min(adapters, default=self.model_name)
        attributes: dict[str, Value] = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "sgl_jax",
            "gen_ai.request.model": model,
            "gen_ai.request.id": seen["request_id"],
            "http.request.method": "POST",
            "http.route": scope["path"],
            "http.response.status_code": status,
        }
        error = None
        if generation is not None:
            attributes |= _attributes_of(generation, time.perf_counter() - seconds)
            error = generation.error
        elif "tokens" in seen:
            attributes["gen_ai.usage.input_tokens"] = seen["tokens"][0]
        refused = 400 <= status < 500  # a refusal is the client's to mend, and no failure
        if refused or status >= 500 or error is not None:
            attributes["error.type"] = str(status) if refused or error is None else type(error).__name__
        failed = None if refused or "error.type" not in attributes else str(error or status)
        span = RequestSpan(f"{operation} {model}", ended - int(seconds * 1e9), ended, attributes, failed)
        self.tracer.record(span, Headers(scope=scope))


def _attributes_of(generation: Generation, started: float) -> Mapping[str, Value]:
    """Return what was asked of a generation and what came of it. `started`: when its request came, by perf_counter."""
    params = generation.requests[0].params
    found: dict[str, Value | None] = {
        "gen_ai.request.stream": generation.stream,
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.top_k": params.top_k if params.top_k > 0 else None,
        "gen_ai.request.frequency_penalty": params.frequency_penalty or None,
        "gen_ai.request.presence_penalty": params.presence_penalty or None,
        "gen_ai.request.seed": params.seed if params.seed is not None and params.seed < 2**63 else None,
        "gen_ai.request.choice.count": params.n if params.n > 1 else None,
        "gen_ai.usage.input_tokens": generation.num_prompt_tokens,
        "gen_ai.usage.output_tokens": generation.num_tokens,
        "gen_ai.response.finish_reasons": generation.finish_types,
        "gen_ai.latency.time_in_queue": generation.queue_seconds,
    }
    if generation.first_token_at is not None:
        found["gen_ai.latency.time_to_first_token"] = generation.first_token_at - started
        if generation.stream:
            found["gen_ai.response.time_to_first_chunk"] = generation.first_token_at - started
    return {name: value for name, value in found.items() if value is not None}
