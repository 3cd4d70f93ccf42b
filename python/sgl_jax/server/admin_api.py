"""Routes about the server itself: health, models, information and metrics."""

import asyncio

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from sgl_jax import __version__
from sgl_jax.engine.messages import AdapterInfo
from sgl_jax.observability.metrics import ApiState, exposition
from sgl_jax.server.app_state import ServerState, json_response
from sgl_jax.server.documentation import documented
from sgl_jax.server.error_envelope import ApiError, unknown_model
from sgl_jax.server.responses import (
    AddedTokenInfo,
    Load,
    ModelCard,
    ModelInfo,
    ModelList,
    RankLoad,
    ServerInfo,
    Status,
    TokenizerInfo,
    Version,
)
from sgl_jax.server.sse import json_unless_disconnected

_HEALTH_TIMEOUT_S = 20.0


def router(state: ServerState) -> APIRouter:
    routes = APIRouter()
    for add in (_add_health, _add_models, _add_information):
        add(routes, state)
    return routes


def _add_health(routes: APIRouter, state: ServerState) -> None:
    service = state.service

    @routes.get("/health", tags=["Health"], **documented(Status, without=(401,)))
    async def health() -> Response:
        """Answers 200 while the process and its engine live, from the start on."""
        if service.failure is not None:
            service.check_ready()
        return json_response(Status("alive"))

    @routes.get("/ready", tags=["Health"], **documented(Status, without=(401,)))
    async def ready() -> Response:
        """Answers 200 when requests are accepted: after warming up, until shutting down, unless the engine hangs."""
        service.check_progress()
        return json_response(Status("ready"))

    @routes.post("/ping", tags=["Health"], **documented(Status, without=(401,)))
    @routes.get("/ping", tags=["Health"], **documented(Status, without=(401,)))
    async def ping() -> Response:
        """Answers as /ready does, under the name that SageMaker asks for."""
        return await ready()

    @routes.get("/health_generate", tags=["Health"], **documented(Status))
    async def health_generate(request: Request) -> Response:
        """Answers 200 when a token could be generated just now."""
        service.check_ready()

        async def one_token() -> Status:
            await service.probe(num_tokens=1)
            return Status("generating")

        try:
            async with asyncio.timeout(_HEALTH_TIMEOUT_S):
                return await json_unless_disconnected(request, one_token())
        except TimeoutError:
            text = f"no token came within {_HEALTH_TIMEOUT_S:.0f} s"
            raise ApiError(503, text, type="service_unavailable", code="timeout") from None


def _add_models(routes: APIRouter, state: ServerState) -> None:
    @routes.get("/v1/models", tags=["OpenAI"], **documented(ModelList))
    async def models() -> Response:
        adapters = (_adapter_card(state, each) for each in state.service.adapters.loaded)
        return json_response(ModelList([_card(state), *adapters]))

    @routes.get("/v1/models/{model:path}", tags=["OpenAI"], **documented(ModelCard, 404))
    async def model(model: str) -> Response:
        adapters = state.service.adapters
        cards = [_adapter_card(state, each) for each in adapters.loaded if each.name == model]
        if not cards and not state.serves(model):
            raise unknown_model(model, state.model_name, adapters)
        return json_response(cards[0] if cards else _card(state))


def _add_information(routes: APIRouter, state: ServerState) -> None:
    service = state.service

    @routes.get("/get_model_info", tags=["Information"], **documented(ModelInfo))
    async def get_model_info() -> Response:
        info = service.info
        same = _path(state), state.tokenizer_path, info.pooling is None, None
        sizes = info.context_length, info.vocab_size
        version = service.trainer.weight_version
        return json_response(ModelInfo(*same, info.architecture, info.dtype, *sizes, version))

    @routes.get("/get_server_info", tags=["Information"], **documented(ServerInfo))
    async def get_server_info() -> Response:
        """Returns every flag at the top level (secrets hidden), what the engine resolved, and its latest numbers."""
        info, stats = service.info, service.stats
        numbers = {"last_gen_throughput": stats.gen_throughput, **msgspec.structs.asdict(stats)}
        if stats.accepted_per_position:  # the launch speculates
            numbers["avg_spec_accept_length"] = stats.drafts.accept_length
        about = {"tokenizer_path": state.tokenizer_path, "version": __version__, "engine": info}
        sizes = {"max_total_num_tokens": info.max_total_tokens, "internal_states": [numbers]}
        return json_response({**state.server_args.to_dict(), **about, **sizes})

    @routes.get("/load", tags=["Information"], **documented(Load, without=(500, 503)))
    async def load() -> Response:
        """Counts the requests that have not been answered yet, each of n for itself."""
        return json_response(Load(service.num_live))

    @routes.get("/get_load", tags=["Information"], **documented(RankLoad, only_list=True))
    async def get_load() -> Response:
        """Returns what the engine reported last, of all data ranks together as one."""
        stats, tokens = service.stats, service.info.max_total_tokens
        total = stats.num_running + stats.num_waiting
        return json_response([RankLoad(0, total, stats.num_waiting, round(stats.kv_usage * tokens))])

    @routes.get("/tokenizer_info", tags=["Information"], **documented(TokenizerInfo))
    async def tokenizer_info() -> Response:
        """Describes the tokenizer, with the names that tokenizer_config.json has, for clients that count tokens."""
        tokenizer, limit = state.tokenizer, service.info.context_length
        added = {i: AddedTokenInfo(token, i in tokenizer.special) for i, token in tokenizer.added_tokens.items()}
        template = tokenizer.template_source()
        about = TokenizerInfo(tokenizer.class_name, limit, tokenizer.vocab_size, template, added)
        return json_response({**msgspec.structs.asdict(about), **tokenizer.special_names})

    @routes.get("/version", tags=["Information"], **documented(Version, without=(500, 503)))
    async def version() -> Response:
        return json_response(Version(__version__))

    @routes.get("/metrics", tags=["Information"], **documented(None, without=(500, 503), media_type="text/plain"))
    async def metrics() -> Response:
        """Returns the metrics in the format of Prometheus."""
        about = {"version": __version__, "model_name": state.model_name}
        num_adapters = len(service.adapters.loaded) if service.ready_once else 0
        api = ApiState(num_adapters, service.trainer.holds, state.responses)
        text, media_type = exposition(service.metrics, service.stats, about, api, state.server_args.metrics_compat)
        return Response(text, media_type=media_type)


def _card(state: ServerState) -> ModelCard:
    limit = state.service.info.context_length
    return ModelCard(state.model_name, int(state.started), _path(state), limit)


def _path(state: ServerState) -> str:
    """Return where the weights in use are from."""
    return state.service.trainer.model_path or state.server_args.model_path


def _adapter_card(state: ServerState, adapter: AdapterInfo) -> ModelCard:
    return msgspec.structs.replace(_card(state), id=adapter.name, root=adapter.path, parent=state.model_name)
