"""A native call, /generate's or Engine.generate's: prompts and parameters in, requests submitted, answers out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from sgl_jax.engine.generation import Generation, GenerationRequest
from sgl_jax.engine.native import Answer, LogprobOptions, native_name, sampling_params
from sgl_jax.engine.service import GenerationService
from sgl_jax.request import InvalidParameter, SamplingParams
from sgl_jax.text.tokenizer import Tokenizer

type Params = Mapping[str, Any] | SamplingParams
type Result = dict[str, Any] | list[dict[str, Any]]


class Job:
    """A native call: its requests, and whether its answer is one or a list."""

    def __init__(self, requests: list[GenerationRequest], is_list: bool, options: LogprobOptions, tokenizer: Tokenizer):
        self.requests = requests
        self.is_list = is_list or any(request.params.n > 1 for request in requests)
        self._options, self._tokenizer = options, tokenizer

    def submit(self, service: GenerationService, stream: bool) -> Generation:
        """Raises what `GenerationService.submit` raises, with the native names of parameters."""
        try:
            generation = service.submit(self.requests, stream)
        except InvalidParameter as error:
            raise native_name(error) from error
        self.requests = generation.requests
        return generation

    def answers(self) -> dict[tuple[int, int], Answer]:
        """Empty answers by (prompt, choice), in the order of the answer's list."""
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

    async def stream(self, service: GenerationService) -> AsyncIterator[dict[str, Any]]:
        generation = self.submit(service, stream=True)
        async for answer in self.stream_of(generation):
            yield answer

    async def stream_of(self, generation: Generation) -> AsyncIterator[dict[str, Any]]:
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
    text: str | Sequence[str] | None,
    input_ids: Any,
    params: Params | Sequence[Params | None] | None,
    rid: str | Sequence[str] | None,
    options: LogprobOptions,
    namespace: str = "",
) -> Job:
    """Raises InvalidParameter or TokenizerError; nothing has been sent then."""
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
    all_params = _one_each("sampling_params", params, len(prompts), (Mapping, SamplingParams))
    rids = _one_each("rid", rid, len(prompts), (str,))
    if isinstance(rid, str) and len(prompts) > 1:
        rids = [f"{rid}_{i}" for i in range(len(prompts))]
    requests = []
    for ids, each, request_id in zip(prompts, all_params, rids, strict=True):
        parsed, score_only = sampling_params(each)
        parsed = options.apply(parsed, len(ids))
        requests.append(GenerationRequest(ids, parsed, request_id or "", namespace, field, score_only))
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


def _one_each(name: str, value: Any, count: int, single: tuple[type, ...]) -> Sequence[Any]:
    if value is None or isinstance(value, single):
        return [value] * count
    if not isinstance(value, Sequence) or any(v is not None and not isinstance(v, single) for v in value):
        raise InvalidParameter(name, f"{name} must be {' or '.join(t.__name__ for t in single)}, or a list of them")
    if len(value) != count:
        raise InvalidParameter(name, f"{name} has {len(value)} entries for {count} prompts")
    return value
