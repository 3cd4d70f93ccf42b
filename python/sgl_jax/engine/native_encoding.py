"""Native calls for vectors, by Engine.encode: prompts in, embeddings, probabilities or scores out."""

from collections.abc import Sequence
from typing import NamedTuple

from sgl_jax.engine.encoding import Encoded, EncodeRequest, check_task
from sgl_jax.engine.native_call import Reply, native_call
from sgl_jax.engine.native_params import LogprobOptions
from sgl_jax.engine.pooled_results import check_dimensions, embedding, probabilities, relevance
from sgl_jax.engine.pooling_info import PoolingInfo
from sgl_jax.engine.service import GenerationService
from sgl_jax.request import InvalidParameter


class NativeEncoding(NamedTuple):
    """The requests of one call for vectors. Its answer is one reply, or a list with one for each prompt."""

    requests: Sequence[EncodeRequest]
    is_list: bool
    pooling: PoolingInfo
    dimensions: int | None

    async def result(self, service: GenerationService) -> Reply | list[Reply]:
        """Submit the requests and return the answer. Raises what `GenerationService.encode` raises."""
        found = [_reply(each, self.pooling, self.dimensions) for each in await service.encode(self.requests)]
        return found if self.is_list else found[0]


def native_encoding(
    service: GenerationService,
    text: str | Sequence[str] | None,
    input_ids: Sequence[int] | Sequence[Sequence[int]] | None,
    dimensions: int | None,
    rid: str | Sequence[str] | None,
    lora_path: str | Sequence[str | None] | None,
    priority: int = 0,
    *,
    text_field: str = "text",
) -> NativeEncoding:
    """Make the call's requests. Raises InvalidParameter; nothing has been sent then. `text_field`: the name that the user
    has for `text`."""
    service.check_ready()
    check_task(service.info, pools=True)
    pooling = service.info.pooling
    assert pooling is not None
    if dimensions is not None and pooling.kind != "embed":
        raise InvalidParameter("dimensions", f"dimensions cannot be had with --task {pooling.kind}; leave it out")
    check_dimensions(pooling, dimensions)
    _check_texts(service, text, text_field)
    given = service.tokenizer, service.info.context_length, text, input_ids, None, rid, LogprobOptions()
    call = native_call(*given, lora_path=lora_path, text_field=text_field)
    requests = []
    for i, each in enumerate(call.requests):
        name = _name(each.names["prompt"], i, call.is_list)
        requests.append(EncodeRequest(each.prompt_ids, each.request_id, name, "", each.adapter, priority))
    return NativeEncoding(requests, call.is_list, pooling, dimensions)


def _check_texts(service: GenerationService, text: str | Sequence[str] | None, field: str) -> None:
    """Raise QueueFull or InvalidParameter for more texts than the queue takes, InvalidParameter for an empty one."""
    if not isinstance(text, Sequence):
        return  # native_call says more
    texts, is_list = ([text], False) if isinstance(text, str) else (text, True)
    service.check_count(len(texts), 1, {"prompt": field})
    for i, each in enumerate(texts):
        if isinstance(each, str) and not each:
            name = _name(field, i, is_list)
            raise InvalidParameter(name, f"{name} is empty; at least one token is needed")


def _name(field: str, index: int, is_list: bool) -> str:
    return f"{field}[{index}]" if is_list else field


def _reply(encoded: Encoded, pooling: PoolingInfo, dimensions: int | None) -> Reply:
    numbers = {"prompt_tokens": encoded.num_prompt_tokens, "cached_tokens": encoded.num_cached_tokens}
    if pooling.kind == "embed":
        return {"embedding": embedding(encoded.vector, pooling, dimensions).tolist(), "meta_info": numbers}
    probs = probabilities(encoded.vector, pooling)
    answer: Reply = {"logits": encoded.vector.tolist(), "probs": probs.tolist(), "labels": pooling.labels}
    if pooling.kind == "score":
        answer["score"] = relevance(encoded.vector, pooling)
    else:
        answer["label"] = pooling.labels[int(probs.argmax())]
    return answer | {"meta_info": numbers}
