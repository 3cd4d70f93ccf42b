"""Token counts of a response."""

from __future__ import annotations

from collections.abc import Sequence

from sgl_jax.engine.generation import GenerationRequest, Update
from sgl_jax.server.responses import PromptTokensDetails, Usage


class UsageCounter:
    """Prompts count once each, however many choices they have; every choice's tokens count."""

    def __init__(self, requests: Sequence[GenerationRequest]):
        self._num_prompt = sum(len(request.prompt_ids) for request in requests)
        self._num_completion = 0
        self._num_cached = [0] * len(requests)

    def add(self, update: Update) -> None:
        self._num_completion += len(update.token_ids)
        if update.choice == 0:
            self._num_cached[update.prompt] = update.num_cached_tokens

    def total(self) -> Usage:
        return Usage(
            self._num_prompt,
            self._num_completion,
            self._num_prompt + self._num_completion,
            PromptTokensDetails(sum(self._num_cached)),
        )
