"""HTTP application: its routes, the API key, and errors in one form."""

from __future__ import annotations

import hmac
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from sgl_jax import __version__
from sgl_jax.engine.service import GenerationService
from sgl_jax.server import (
    admin_api,
    documentation,
    error_envelope,
    measuring_api,
    native_api,
    openai_chat,
    openai_completions,
)
from sgl_jax.server.app_state import ServerState
from sgl_jax.server.error_envelope import ApiError

if TYPE_CHECKING:
    from sgl_jax.settings.server_args import ServerArgs

_OPEN_PATHS = frozenset({"/health", "/ready"})


class ApiKeyGuard:
    """Passes on requests that bring the key or ask for health, and refuses all others."""

    def __init__(self, app: ASGIApp, api_key: str):
        self._app = app
        self._expected = api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in _OPEN_PATHS:
            given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            scheme, _, key = given.partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self._expected):
                text = "the API key is missing or wrong; send it as Authorization: Bearer …"
                await ApiError(401, text, code="invalid_api_key").response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


def create_app(service: GenerationService, server_args: ServerArgs) -> FastAPI:
    app = FastAPI(
        title="sgl_jax",
        version=__version__,
        description="Serve large language models with JAX: OpenAI's API and the native one.",
        redirect_slashes=False,
        redoc_url=None,
    )
    state = ServerState(service, server_args)
    for module in (openai_chat, openai_completions, native_api, measuring_api, admin_api):
        app.include_router(module.router(state))
    error_envelope.install(app)
    documentation.install(app)
    if server_args.api_key is not None:
        app.add_middleware(ApiKeyGuard, api_key=server_args.api_key)
    return app
