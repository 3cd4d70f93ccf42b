"""Routes for a trainer, with the paths and fields of SGLang: pausing, other weights, and memory that is lent."""

from typing import Annotated

from fastapi import APIRouter
from pydantic import Field
from starlette.responses import Response

from sgl_jax.engine.messages import MemoryTag, PauseMode, StateChanged, WeightsFormat
from sgl_jax.server.app_state import ServerState, json_response
from sgl_jax.server.bodies import Body, Off, null_fields, with_fields
from sgl_jax.server.documentation import BODY, documented
from sgl_jax.server.responses import TrainerAnswer

Tags = Annotated[list[MemoryTag], Field(min_length=1, max_length=2)]


class PauseRequest(Body):
    mode: PauseMode | None = Field(
        None, description="abort ends requests; with retract and in_place they wait; abort if not set"
    )


class ContinueRequest(Body):
    torch_empty_cache: Off | None = None


@with_fields(null_fields("manifest recapture_cuda_graph token_step"))
class UpdateWeightsRequest(Body):
    model_path: Annotated[str, Field(min_length=1)] = Field(
        description="a folder or file on the server's machine, or a hub id"
    )
    load_format: WeightsFormat | None = None
    abort_all_requests: bool | None = Field(None, description="if not, requests go on with the new weights")
    flush_cache: bool | None = Field(None, description="only true: prefixes of the old weights always go")
    weight_version: Annotated[str, Field(max_length=256)] | None = None
    is_async: Off | None = None
    keep_pause: Off | None = None
    torch_empty_cache: Off | None = None


class MemoryRequest(Body):
    tags: Tags | None = Field(None, description="all if not set")


def router(state: ServerState) -> APIRouter:
    routes, service = APIRouter(tags=["Training"]), state.service
    about = documented(TrainerAnswer, 409, *BODY)

    @routes.post("/pause_generation", **about)
    async def pause_generation(body: PauseRequest | None = None) -> Response:
        """Computes no further step, and answers when none is in flight. Requests that come later wait."""
        service.check_ready()
        return _answer(await service.trainer.pause((body or PauseRequest()).mode or "abort"))

    @routes.post("/continue_generation", **about)
    async def continue_generation(body: ContinueRequest | None = None) -> Response:
        service.check_ready()
        return _answer(await service.trainer.go_on())

    @routes.post("/update_weights_from_disk", **about)
    async def update_weights_from_disk(body: UpdateWeightsRequest) -> Response:
        """Reads weights of the same model while requests run, and answers when all further tokens are theirs."""
        service.check_ready()
        return _answer(
            await service.trainer.update(
                body.model_path,
                body.load_format or "auto",
                abort_all_requests=bool(body.abort_all_requests),
                flush_cache=body.flush_cache is not False,
                weight_version=body.weight_version,
            )
        )

    @routes.post("/release_memory_occupation", **about)
    async def release_memory_occupation(body: MemoryRequest | None = None) -> Response:
        """Gives back memory of the devices; 409 while requests run. Requests that come later wait."""
        service.check_ready()
        return _answer(await service.trainer.release((body or MemoryRequest()).tags))

    @routes.post("/resume_memory_occupation", **about)
    async def resume_memory_occupation(body: MemoryRequest | None = None) -> Response:
        """Takes the memory again."""
        service.check_ready()
        return _answer(await service.trainer.resume((body or MemoryRequest()).tags))

    return routes


def _answer(changed: StateChanged) -> Response:
    return json_response(TrainerAnswer(True, changed.message, changed.num_waiting))
