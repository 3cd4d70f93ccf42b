"""Routes that control the profiler: /start_profile, /stop_profile, /profile_status."""

import os
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from pydantic import Field
from starlette.responses import Response

from sgl_jax.engine.generation import Conflict
from sgl_jax.engine.messages import GetProfile, ProfileStatus, StartProfile, StopProfile
from sgl_jax.engine.profiling import MOST_STEPS
from sgl_jax.request import InvalidParameter
from sgl_jax.server.app_state import ServerState, json_response
from sgl_jax.server.bodies import Body, Off, null_fields, with_fields
from sgl_jax.server.documentation import BODY, documented
from sgl_jax.server.error_envelope import ApiError


# SGLang's parameters that are not supported, beside those that accept false
@with_fields(null_fields("activities profile_id profile_prefix profile_stages stage_id start_step"))
class StartProfileRequest(Body):
    output_dir: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="a folder inside the server's --profiler-dir; that folder if not set"
    )
    num_steps: Annotated[int, Field(ge=1, le=MOST_STEPS)] | None = Field(
        None, description=f"the profile ends by itself after so many engine steps; {MOST_STEPS} if not set"
    )
    host_tracer_level: Annotated[int, Field(ge=0, le=3)] | None = Field(
        None, description="of the host: 0 nothing to 3 everything; 2 if not set"
    )
    python_tracer_level: Annotated[int, Field(ge=0, le=1)] | None = Field(
        None, description="0 if not set; 1: every Python call"
    )
    merge_profiles: Off | None = None
    profile_by_stage: Off | None = None
    record_shapes: Off | None = None
    with_stack: Off | None = None


def _without_query(request: Request) -> None:
    """Refuse parameters in the URL: they would be ignored, and a profile without its num_steps has no end."""
    for name in request.query_params:
        text = f"{name} is not taken from the URL; POST it in a JSON body"
        raise ApiError(400, text, param=name, code="unknown_parameter")


def _folder_inside(allowed: str | None, asked: str | None) -> str:
    """Return the folder for a profile: `asked`, which may be relative, if it is in the allowed one."""
    if allowed is None:
        raise Conflict("profiles are off; start the server with --profiler-dir, the folder that they may be written to")
    try:
        root = os.path.realpath(allowed)
        folder = os.path.realpath(os.path.join(root, asked or ""))
        if os.path.commonpath((root, folder)) == root:
            return folder
        reason = f"it leads out of --profiler-dir {root}"
    except (OSError, ValueError) as error:  # characters that no path has
        reason = str(error)
    raise InvalidParameter("output_dir", f"output_dir is {asked!r}; {reason}")


def router(state: ServerState) -> APIRouter:
    routes = APIRouter(tags=["Measuring"], dependencies=[Depends(_without_query)])
    service = state.service

    @routes.post("/start_profile", **documented(ProfileStatus, 409, *BODY))
    async def start_profile(body: StartProfileRequest | None = None) -> Response:
        """Records what engine and device do, until /stop_profile or for num_steps steps; 409 if a profile runs, or
        without --profiler-dir."""
        asked = body or StartProfileRequest()
        folder = _folder_inside(state.server_args.profiler_dir, asked.output_dir)
        levels = asked.host_tracer_level, asked.python_tracer_level
        return json_response(await service.profile(lambda call: StartProfile(call, folder, asked.num_steps, *levels)))

    @routes.post("/stop_profile", **documented(ProfileStatus, 409))
    async def stop_profile() -> Response:
        """Ends the profile and names its files; 409 if none runs."""
        return json_response(await service.profile(StopProfile))

    @routes.get("/profile_status", **documented(ProfileStatus))
    async def profile_status() -> Response:
        """Returns the state of the profile that runs, or else of the last one."""
        return json_response(await service.profile(GetProfile))

    return routes
