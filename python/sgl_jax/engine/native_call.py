"""Native calls, by /generate and Engine.generate: prompts and parameters in, requests submitted, answers out."""

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from sgl_jax.engine.checks import encoded
from sgl_jax.engine.generation import Generation, GenerationRequest
from sgl_jax.engine.native_params import LogprobOptions, NativeAnswer, Params, sampling_params
from sgl_jax.engine.service import GenerationService
from sgl_jax.request import InvalidParameter, Json, SamplingParams
from sgl_jax.text.tokenizer import Tokenizer

type Reply = dict[str, Json]  # {"text", "output_ids", "meta_info"}


class NativeCall:
    """The requests of one call. Its answer is one reply, or a list with one for each prompt and choice."""

    def __init__(self, requests: list[GenerationRequest], is_list: bool, options: LogprobOptions, tokenizer: Tokenizer):
        self.requests = requests
        self.is_list = is_list or any(request.params.n > 1 for request in requests)
        self._options, self._tokenizer = options, tokenizer

    async def result(self, service: GenerationService) -> Reply | list[Reply]:
        """Submit the requests and return the answer. Raises what `GenerationService.submit` raises."""
        return await self.answer(await service.submit(self.requests, stream=False))

    async def answer(self, generation: Generation) -> Reply | list[Reply]:
        """Return the answer of the submitted requests, when they have ended."""
        answers = self._answers(generation)
        async for updates in generation.updates():
            for update in updates:
                answers[update.prompt, update.choice].add(update)
        found = [answer.to_dict() for answer in answers.values()]
        return found if self.is_list else found[0]

    async def stream(self, generation: Generation) -> AsyncIterator[Reply]:
        """Yield a growing reply for each update of the submitted requests; with "index" if the answer is a list."""
        answers = self._answers(generation)
        index = {key: i for i, key in enumerate(answers)}
        try:
            async for updates in generation.updates():
                for update in updates:
                    key = update.prompt, update.choice
                    answers[key].add(update)
                    found = answers[key].to_dict()
                    yield {"index": index[key], **found} if self.is_list else found
        finally:
            generation.abort()

    def _answers(self, generation: Generation) -> dict[tuple[int, int], NativeAnswer]:
        """Make empty answers by (prompt, choice), in the order of the answer's list."""
        return {
            (i, choice): NativeAnswer(request, self._tokenizer, self._options)
            for i, request in enumerate(generation.requests)
            for choice in range(request.params.n)
        }


def native_call(
    tokenizer: Tokenizer,
    context_length: int,
    text: object,
    input_ids: object,
    params: Params | Sequence[Params | None] | None,
    rid: str | Sequence[str] | None,
    options: LogprobOptions,
    namespace: str = "",
    lora_path: str | Sequence[str | None] | None = None,
    text_field: str = "text",
) -> NativeCall:
    """Make the call's requests. Raises InvalidParameter; nothing has been sent then. `text_field`: the name that the
    user has for `text`."""
    if (text is None) == (input_ids is None):
        raise InvalidParameter(text_field, f"give either {text_field} or input_ids")
    if input_ids is None:
        field, is_list = text_field, not isinstance(text, str)
        prompts = [encoded(tokenizer, each, field, context_length) for each in _texts(text, field)]
    else:
        field = "input_ids"
        prompts, is_list = _token_lists(input_ids)
    if not prompts:
        raise InvalidParameter(field, f"{field} is an empty list")
    kinds = (Mapping, SamplingParams, GenerationRequest)
    all_params = _one_each("sampling_params", params, len(prompts), kinds, "Mapping or SamplingParams")
    rids = _one_each("rid", rid, len(prompts), (str,), "str")
    if isinstance(rid, str) and len(prompts) > 1:
        rids = [f"{rid}_{i}" for i in range(len(prompts))]
    adapters = _one_each("lora_path", lora_path, len(prompts), (str,), "str")
    requests = []
    for ids, each, request_id, adapter in zip(prompts, all_params, rids, adapters, strict=True):
        given = options.apply(sampling_params(each), len(ids))
        requests.append(given.for_prompt(ids, field, request_id, namespace, adapter))
    return NativeCall(requests, is_list, options, tokenizer)


def _texts(text: Any, field: str) -> list[str]:
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, Sequence) or not all(isinstance(each, str) for each in texts):
        raise InvalidParameter(field, f"{field} must be a string or a list of strings")
    return list(texts)


def _token_lists(input_ids: Any) -> tuple[list[list[int]], bool]:
    """Return the prompts, and whether a list of prompts was given. Arrays are accepted, too."""
    ids = input_ids.tolist() if hasattr(input_ids, "tolist") else input_ids
    if isinstance(ids, list | tuple):
        rows = [each.tolist() if hasattr(each, "tolist") else each for each in ids]
        if rows and all(type(each) is int for each in rows):
            return [rows], False
        if all(isinstance(row, list | tuple) and all(type(each) is int for each in row) for row in rows):
            return [list(row) for row in rows], True
    raise InvalidParameter("input_ids", "input_ids must be a list of token ids or a list of such lists")


def _one_each(name: str, value: Any, count: int, single: tuple[type, ...], kind: str) -> Sequence[Any]:
    """Return `count` values: the one that was given for all, or those of a list."""
    if value is None or isinstance(value, single):
        return [value] * count
    if not isinstance(value, Sequence) or any(v is not None and not isinstance(v, single) for v in value):
        raise InvalidParameter(name, f"{name} must be {kind}, or a list of them")
    if len(value) != count:
        raise InvalidParameter(name, f"{name} has {len(value)} entries for {count} prompts")
    return value
