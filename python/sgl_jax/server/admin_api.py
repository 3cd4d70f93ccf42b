"""Routes about the server itself: health, models, information and metrics."""

import asyncio

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from sgl_jax import __version__
from sgl_jax.engine.generation import GenerationRequest
from sgl_jax.observability.metrics import exposition
from sgl_jax.request import SamplingParams
from sgl_jax.server.app_state import ServerState, json_response
from sgl_jax.server.documentation import documented
from sgl_jax.server.error_envelope import ApiError, unknown_model
from sgl_jax.server.responses import ModelCard, ModelInfo, ModelList, ServerInfo, Status, Version
from sgl_jax.server.sse import json_unless_disconnected

_HEALTH_TIMEOUT_S = 20.0


def router(state: ServerState) -> APIRouter:
    routes = APIRouter()
    for add in (_add_health, _add_models, _add_information):
        add(routes, state)
    return routes


def _add_health(routes: APIRouter, state: ServerState) -> None:
    service = state.service

    @routes.get("/health", tags=["Health"], **documented(Status, body=False, guarded=False))
    async def health() -> Response:
        """Answers 200 while the process and its engine live, from the start on."""
        if service.failure is not None:
            service.check_ready()
        return json_response(Status("alive"))

    @routes.get("/ready", tags=["Health"], **documented(Status, body=False, guarded=False))
    async def ready() -> Response:
        """Answers 200 when requests are accepted: after warming up, until shutting down, unless the engine hangs."""
        service.check_progress()
        return json_response(Status("ready"))

    @routes.get("/health_generate", tags=["Health"], **documented(Status, body=False, stream=False))
    async def health_generate(request: Request) -> Response:
        """Answers 200 when a token could be generated just now."""
        token = state.tokenizer.bos_token_id or 0
        asked = GenerationRequest([token], SamplingParams(max_tokens=1, temperature=0.0))
        generation = await service.submit([asked], stream=False)

        async def one_token() -> Status:
            async for _ in generation.updates():
                pass
            return Status("generating")

        try:
            async with asyncio.timeout(_HEALTH_TIMEOUT_S):
                return await json_unless_disconnected(request, one_token())
        except TimeoutError:
            text = f"no token came within {_HEALTH_TIMEOUT_S:.0f} s"
            raise ApiError(503, text, type="service_unavailable", code="timeout") from None
        finally:
            generation.abort()


def _add_models(routes: APIRouter, state: ServerState) -> None:
    @routes.get("/v1/models", tags=["OpenAI"], **documented(ModelList, body=False))
    async def models() -> Response:
        return json_response(ModelList([_card(state)]))

    @routes.get("/v1/models/{model:path}", tags=["OpenAI"], **documented(ModelCard, body=False, model=True))
    async def model(model: str) -> Response:
        if not state.serves(model):
            raise unknown_model(model, state.model_name)
        return json_response(_card(state))


def _add_information(routes: APIRouter, state: ServerState) -> None:
    service = state.service

    @routes.get("/get_model_info", tags=["Information"], **documented(ModelInfo, body=False))
    async def get_model_info() -> Response:
        info = service.info
        return json_response(
            ModelInfo(
                model_path=state.server_args.model_path,
                tokenizer_path=state.tokenizer_path,
                is_generation=True,
                preferred_sampling_params=None,
                architecture=info.architecture,
                dtype=info.dtype,
                context_length=info.context_length,
                vocab_size=info.vocab_size,
            )
        )

    @routes.get("/get_server_info", tags=["Information"], **documented(ServerInfo, body=False))
    async def get_server_info() -> Response:
        """Returns every flag at the top level (secrets hidden), what the engine resolved, and its latest numbers."""
        engine = msgspec.to_builtins(service.info)
        return json_response(
            {
                **state.server_args.to_dict(),
                "tokenizer_path": state.tokenizer_path,
                "version": __version__,
                "max_total_num_tokens": engine["max_total_tokens"],
                "engine": engine,
                "internal_states": [
                    {"last_gen_throughput": service.stats.gen_throughput} | msgspec.structs.asdict(service.stats)
                ],
            }
        )

    @routes.get("/version", tags=["Information"], **documented(Version, body=False, engine=False))
    async def version() -> Response:
        return json_response(Version(__version__))

    @routes.get("/metrics", tags=["Information"], **documented(None, body=False, engine=False, media_type="text/plain"))
    async def metrics() -> Response:
        """Returns the metrics in the format of Prometheus."""
        about = {"version": __version__, "model_name": state.model_name}
        text, media_type = exposition(service.metrics, service.stats, about)
        return Response(text, media_type=media_type)


def _card(state: ServerState) -> ModelCard:
    limit = state.service.info.context_length
    return ModelCard(state.model_name, int(state.started), state.server_args.model_path, limit)
