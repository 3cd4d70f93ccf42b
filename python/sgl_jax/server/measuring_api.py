"""What the machine can do and where the time goes: POST /measure_limits."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from sgl_jax.engine.messages import MachineLimits
from sgl_jax.server.documentation import documented
from sgl_jax.server.state import ServerState, json_response


def router(state: ServerState) -> APIRouter:
    routes = APIRouter(tags=["Measuring"])

    @routes.post("/measure_limits", **documented(MachineLimits, body=False, conflict=True))
    async def measure_limits() -> Response:
        """Measures the devices: takes seconds, in which requests wait; 409 while there are any."""
        return json_response(await state.service.measure_limits())

    return routes
