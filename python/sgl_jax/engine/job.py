"""A native call, /generate's or Engine.generate's: prompts and parameters in, requests submitted, answers out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from sgl_jax.engine.generation import Generation, GenerationRequest, Given
from sgl_jax.engine.native_params import Answer, LogprobOptions, Params, sampling_params
from sgl_jax.engine.service import GenerationService
from sgl_jax.request import InvalidParameter, Json, SamplingParams
from sgl_jax.text.tokenizer import Tokenizer

type Result = dict[str, Json] | list[dict[str, Json]]


class Job:
    """A native call: its requests, and whether its answer is one or a list."""

    def __init__(self, requests: list[GenerationRequest], is_list: bool, options: LogprobOptions, tokenizer: Tokenizer):
        self.requests = requests
        self.is_list = is_list or any(request.params.n > 1 for request in requests)
        self._options, self._tokenizer = options, tokenizer

    def submit(self, service: GenerationService, stream: bool) -> Generation:
        """Submits the requests; raises what `GenerationService.submit` raises."""
        generation = service.submit(self.requests, stream)
        self.requests = generation.requests
        return generation

    def answers(self) -> dict[tuple[int, int], Answer]:
        """Makes empty answers by (prompt, choice), in the order of the answer's list."""
        return {
            (i, choice): Answer(request, request.request_id, self._tokenizer, self._options)
            for i, request in enumerate(self.requests)
            for choice in range(request.params.n)
        }

    async def result(self, service: GenerationService) -> Result:
        generation = self.submit(service, stream=False)
        answers = self.answers()
        async for updates in generation.updates():
            for update in updates:
                answers[update.prompt, update.choice].add(update)
        found = [answer.to_dict() for answer in answers.values()]
        return found if self.is_list else found[0]

    async def stream(self, service: GenerationService) -> AsyncIterator[dict[str, Json]]:
        generation = self.submit(service, stream=True)
        async for answer in self.stream_of(generation):
            yield answer

    async def stream_of(self, generation: Generation) -> AsyncIterator[dict[str, Json]]:
        answers = self.answers()
        index = {place: i for i, place in enumerate(answers)}
        try:
            async for updates in generation.updates():
                for update in updates:
                    answer = answers[update.prompt, update.choice]
                    answer.add(update)
                    found = answer.to_dict()
                    yield {"index": index[update.prompt, update.choice], **found} if self.is_list else found
        finally:
            generation.abort()


def make_job(
    tokenizer: Tokenizer,
    text: object,
    input_ids: object,
    params: Params | Sequence[Params | None] | None,
    rid: str | Sequence[str] | None,
    options: LogprobOptions,
    namespace: str = "",
) -> Job:
    """Makes the call's requests. Raises InvalidParameter or TokenizerError; nothing has been sent then."""
    if (text is None) == (input_ids is None):
        raise InvalidParameter("text", "give either text or input_ids")
    if input_ids is None:
        field, is_list = "text", not isinstance(text, str)
        prompts = [tokenizer.encode(each) for each in _texts(text)]
    else:
        field = "input_ids"
        prompts, is_list = _token_lists(input_ids)
    if not prompts:
        raise InvalidParameter(field, f"{field} is an empty list")
    all_params = _one_each(
        "sampling_params", params, len(prompts), (Mapping, SamplingParams, Given), "Mapping or SamplingParams"
    )
    rids = _one_each("rid", rid, len(prompts), (str,), "str")
    if isinstance(rid, str) and len(prompts) > 1:
        rids = [f"{rid}_{i}" for i in range(len(prompts))]
    requests = []
    for ids, each, request_id in zip(prompts, all_params, rids, strict=True):
        given = options.apply(sampling_params(each), len(ids))
        requests.append(GenerationRequest.of(ids, field, given, request_id or "", namespace))
    return Job(requests, is_list, options, tokenizer)


def _texts(text: Any) -> list[str]:
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, Sequence) or not all(isinstance(each, str) for each in texts):
        raise InvalidParameter("text", "text must be a string or a list of strings")
    return list(texts)


def _token_lists(input_ids: Any) -> tuple[list[list[int]], bool]:
    """The prompts, and whether it was a list of them. Arrays are taken too."""
    ids = input_ids.tolist() if hasattr(input_ids, "tolist") else input_ids
    if isinstance(ids, list | tuple):
        rows = [each.tolist() if hasattr(each, "tolist") else each for each in ids]
        if rows and all(type(each) is int for each in rows):
            return [rows], False
        if all(isinstance(row, list | tuple) and all(type(each) is int for each in row) for row in rows):
            return [list(row) for row in rows], True
    raise InvalidParameter("input_ids", "input_ids must be a list of token ids or a list of such lists")


def _one_each(name: str, value: Any, count: int, single: tuple[type, ...], kind: str) -> Sequence[Any]:
    """Returns `count` values: the one that was given for all, or those of a list."""
    if value is None or isinstance(value, single):
        return [value] * count
    if not isinstance(value, Sequence) or any(v is not None and not isinstance(v, single) for v in value):
        raise InvalidParameter(name, f"{name} must be {kind}, or a list of them")
    if len(value) != count:
        raise InvalidParameter(name, f"{name} has {len(value)} entries for {count} prompts")
    return value
