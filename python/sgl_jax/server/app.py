"""HTTP application: its routes, errors in one form, and the layers around it."""

from fastapi import FastAPI
from starlette.types import ASGIApp

from sgl_jax import __version__
from sgl_jax.engine.service import GenerationService
from sgl_jax.observability.request_tracer import RequestTracer
from sgl_jax.server import (
    adapters_api,
    admin_api,
    anthropic_api,
    documentation,
    edge,
    embeddings_api,
    error_envelope,
    measuring_api,
    native_api,
    openai_chat,
    openai_completions,
    openai_responses,
    rerank_api,
    trainer_api,
    web_pages,
)
from sgl_jax.server.app_state import ServerState
from sgl_jax.server.request_spans import RequestSpans
from sgl_jax.settings.server_args import ServerArgs


def create_app(service: GenerationService, server_args: ServerArgs, tracer: RequestTracer | None = None) -> ASGIApp:
    """Return the whole application: the routes, behind the rules for every request, and the log of requests. `tracer`:
    takes their spans."""
    state = ServerState(service, server_args)
    guard = edge.Guard(create_routes(state), _rules(server_args), server_args.max_request_bytes)
    keyless = server_args.api_key is None
    name = server_args.served_model_name or server_args.model_path
    spans = None if tracer is None else RequestSpans(tracer, name)
    pages = edge.Pages(guard, _listed(server_args.allowed_origins), refuse=keyless)
    return edge.RequestLog(pages, state.responses, spans)


def create_routes(state: ServerState) -> FastAPI:
    app = FastAPI(
        title="sgl_jax",
        version=__version__,
        description="Serve large language models with JAX: OpenAI's API and the native one.",
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
    )
    for module in (
        openai_chat,
        openai_completions,
        openai_responses,
        anthropic_api,
        embeddings_api,
        rerank_api,
        native_api,
        measuring_api,
        adapters_api,
        trainer_api,
        admin_api,
    ):
        app.include_router(module.router(state))
    error_envelope.install(app)
    documentation.install(app)
    if not state.server_args.no_ui:
        web_pages.install(app)
    return app


def _rules(args: ServerArgs) -> list[edge.Rule]:
    """Return what is asked of every request, the cheapest first. Without a key, who names this machine may use it."""
    rules = [edge.check_head, edge.body_rule(args.max_request_bytes)]
    hosts = _listed(args.allowed_hosts)
    if "*" not in hosts and (hosts or (args.api_key is None and args.is_local)):
        rules.append(edge.host_rule({*hosts, args.host}))
    return rules if args.api_key is None else [*rules, edge.key_rule(args.api_key)]


def _listed(value: str | None) -> list[str]:
    return [each.strip().lower() for each in (value or "").split(",") if each.strip()]
