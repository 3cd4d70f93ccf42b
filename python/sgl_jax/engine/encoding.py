"""Requests for a vector in place of tokens, and their answers. To the engine they are requests with max_tokens 0."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from sgl_jax.engine.generation import Conflict, Generation, GenerationRequest, NotFinite
from sgl_jax.engine.messages import EngineInfo
from sgl_jax.request import InvalidParameter, SamplingParams

logger = logging.getLogger(__name__)

_PARAMS = SamplingParams(max_tokens=0, temperature=0.0)


@dataclass(frozen=True, slots=True)
class EncodeRequest:
    """Prompt whose vector is wanted."""

    token_ids: list[int]
    request_id: str = ""  # empty: one is generated
    name: str = ""  # the prompt's, for error messages; empty: input, or input[i] of several
    namespace: str = ""
    adapter: str | None = None  # name of a LoRA adapter; None: the model itself
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Encoded:
    """Vector of a prompt as the model gives it (engine.messages.PoolingInfo)."""

    vector: np.ndarray  # f32[size]
    num_prompt_tokens: int
    num_cached_tokens: int


def check_task(info: EngineInfo, *, pools: bool) -> None:
    """Raise InvalidParameter if a launch that generates is asked for vectors, or one that pools for text."""
    if pools and info.pooling is None:
        cure = "start it with --task embed, classify or score"
        raise InvalidParameter("model", f"the launch generates text and makes no vectors; {cure}")
    if not pools and info.pooling is not None:
        reason = f"the launch makes vectors (--task {info.pooling.kind}) and generates no text"
        raise InvalidParameter("model", f"{reason}; start it with --task generate")


def generation_requests(requests: Sequence[EncodeRequest]) -> list[GenerationRequest]:
    """Return the requests as the engine takes them."""
    names = ["input"] if len(requests) == 1 else [f"input[{i}]" for i in range(len(requests))]
    return [
        GenerationRequest(
            each.token_ids,
            msgspec.structs.replace(_PARAMS, priority=each.priority),
            each.request_id,
            each.namespace,
            each.adapter,
            names={"prompt": each.name or name},
        )
        for each, name in zip(requests, names, strict=True)
    ]


def probe_params(num_tokens: int, info: EngineInfo) -> SamplingParams:
    """Return parameters of a request that shows that the launch works: some tokens, or none where vectors are made."""
    return _PARAMS if info.pooling else SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)


async def vectors(generation: Generation) -> list[Encoded]:
    """Wait for the vectors of submitted requests. Cancelled, it aborts them. Raises Conflict if one was aborted by its
    id, and NotFinite for a vector with values that are no finite numbers."""
    choices = [*generation.open]
    async for _ in generation.updates():
        pass
    found = []
    for choice in choices:
        if choice.vector is None:
            raise Conflict(f"request {choice.request.request_id} was aborted")
        vector = np.frombuffer(choice.vector, "<f4").astype(np.float32)
        if not np.isfinite(vector).all():
            error = _not_finite(vector, choice.request.names["prompt"])
            logger.error("request %s failed: %s", choice.request.request_id, error)
            raise error
        found.append(Encoded(vector, len(choice.request.prompt_ids), choice.num_cached_tokens))
    return found


def _not_finite(vector: np.ndarray, name: str) -> NotFinite:
    wrong, size = int((~np.isfinite(vector)).sum()), len(vector)
    cure = "--dtype float32 has a greater range, and a damaged checkpoint has to be downloaded again"
    return NotFinite(name, f"{wrong} of the {size} values that the model made of {name} are no finite numbers; {cure}")
