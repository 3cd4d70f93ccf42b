"""Routes that load and unload LoRA adapters, with the paths of vLLM and of SGLang."""

from typing import Annotated

from fastapi import APIRouter
from pydantic import Field
from starlette.responses import Response

from sgl_jax.request import InvalidParameter
from sgl_jax.server.app_state import ServerState, json_response
from sgl_jax.server.bodies import Body, null_fields, with_fields
from sgl_jax.server.documentation import BODY, documented
from sgl_jax.server.responses import LoadedAdapters

Text = Annotated[str, Field(min_length=1)]


@with_fields(null_fields("added_tokens_config is_3d_lora_weight"))
class LoadAdapterRequest(Body):
    lora_name: Text
    lora_path: Text = Field(description="a folder on the server's machine, or a hub id")
    pinned: bool | None = Field(None, description="it never leaves the devices")
    load_inplace: bool | None = Field(None, description="it replaces the adapter that has the name")


@with_fields(null_fields("lora_int_id lora_id"))
class UnloadAdapterRequest(Body):
    lora_name: Text


def router(state: ServerState) -> APIRouter:
    routes, service = APIRouter(tags=["LoRA adapters"]), state.service
    loading, unloading = documented(LoadedAdapters, 409, *BODY), documented(LoadedAdapters, 404, 409, *BODY)

    def loaded() -> Response:
        return json_response(LoadedAdapters(True, {each.name: each.path for each in service.adapters.loaded}))

    @routes.post("/v1/load_lora_adapter", **loading)
    @routes.post("/load_lora_adapter", **loading)
    async def load_lora_adapter(body: LoadAdapterRequest) -> Response:
        """Reads an adapter, while requests run, and answers when they may name it."""
        service.check_ready()
        if state.serves(body.lora_name):
            raise InvalidParameter("lora_name", f"lora_name is {body.lora_name}; this name means the served model")
        await service.adapters.load(body.lora_name, body.lora_path, bool(body.pinned), bool(body.load_inplace))
        return loaded()

    @routes.post("/v1/unload_lora_adapter", **unloading)
    @routes.post("/unload_lora_adapter", **unloading)
    async def unload_lora_adapter(body: UnloadAdapterRequest) -> Response:
        """Takes no further requests for an adapter, and answers when those that run have ended."""
        service.check_ready()
        await service.adapters.unload(body.lora_name)
        return loaded()

    return routes
