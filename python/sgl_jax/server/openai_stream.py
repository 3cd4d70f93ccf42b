"""Answers of OpenAI's endpoints, whole or as a stream. A chunk encodes only the parts that differ between chunks."""

import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from typing import ClassVar

import msgspec
from fastapi import Request
from starlette.responses import Response

from sgl_jax.engine.generation import FinishType, Generation, Update
from sgl_jax.engine.messages import TokenLogprobs
from sgl_jax.server.app_state import ServerState
from sgl_jax.server.openai_types import SamplingFields
from sgl_jax.server.responses import ChatLogprobs, CompletionLogprobs, PromptTokensDetails, Usage
from sgl_jax.server.sse import DONE, EventStream, json_unless_disconnected

_encode = msgspec.json.encode

type LogprobList = Sequence[TokenLogprobs | None]  # None: for the first token of a prompt


class OpenAIAnswer[Logprobs: ChatLogprobs | CompletionLogprobs](ABC):
    """Answer to one request on its way out. Choice i of prompt p has index p * n + i.

    `echoes` has a text for each prompt, which its choices begin with; empty: none.
    """

    id_prefix: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(
        self,
        state: ServerState,
        body: SamplingFields,
        generation: Generation,
        logprobs: bool,
        echoes: Sequence[str] = (),
    ):
        self.tokenizer = state.tokenizer
        self.id = f"{self.id_prefix}-{uuid.uuid4().hex}"
        self.created, self.model = int(generation.created), body.model or state.model_name
        self._generation, self._echoes, self._logprobs, self._stream = generation, echoes, logprobs, body.stream
        self._n = generation.requests[0].params.n
        self._started: set[int] = set()
        self._num_completion = 0
        self._num_cached = [0] * len(generation.requests)
        self._include_usage = bool(body.stream_options and body.stream_options.include_usage)

    async def respond(self, request: Request) -> Response:
        request.state.generation = self._generation
        if self._stream:
            return EventStream(self._generation, self._events())
        return await json_unless_disconnected(request, self._whole())

    @abstractmethod
    def scored(self, index: int, tokens: Sequence[int], scores: LogprobList) -> Logprobs:
        """Return the log probabilities of the choice's next tokens, in the form of the endpoint."""

    @abstractmethod
    def answer(self, texts: list[str], scores: list[Logprobs | None], finish: list[FinishType]) -> msgspec.Struct:
        """Make the whole answer from its choices."""

    @abstractmethod
    def chunks(self, i: int, first: bool, text: str, scores: Logprobs | None, finish: FinishType | None) -> bytes:
        """Make the chunks of an update of choice `i`; `first`: it is the first one of this choice."""

    def chunk(self, index: int, payload: bytes, logprobs: Logprobs | None, finish: FinishType | None) -> bytes:
        """Encode a chunk as a server-sent event; `payload` is the name and value of the choice's own field, in JSON."""
        parts = index, payload, _encode(logprobs), _encode(finish)
        return self._head + b'{"index":%d,%b,"logprobs":%b,"finish_reason":%b}' % parts + self._tail

    def usage(self) -> Usage:
        """Count tokens. A prompt counts once, however many choices it has; the tokens of every choice count."""
        num_prompt = self._generation.num_prompt_tokens
        cached = PromptTokensDetails(sum(self._num_cached))
        return Usage(num_prompt, self._num_completion, num_prompt + self._num_completion, cached)

    async def _whole(self) -> msgspec.Struct:
        count = self._n * len(self._generation.requests)
        texts = [""] * count
        finish: list[FinishType] = ["abort"] * count
        tokens: list[list[int]] = [[] for _ in range(count)]
        scores: list[list[TokenLogprobs | None]] = [[] for _ in range(count)]
        async for updates in self._generation.updates():
            for update in updates:
                i, _, text, new_tokens, new_scores = self._news(update)
                texts[i] += text
                tokens[i] += new_tokens
                scores[i] += new_scores
                if update.finish is not None:
                    finish[i] = update.finish.type
        logprobs = [self.scored(i, tokens[i], scores[i]) if self._logprobs else None for i in range(count)]
        return self.answer(texts, logprobs, finish)

    async def _events(self) -> AsyncIterator[bytes]:
        head = {"id": self.id, "object": self.chunk_object, "created": self.created, "model": self.model}
        self._head = b"data: " + _encode(head)[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if self._include_usage else b"]}\n\n"
        async for updates in self._generation.updates():
            data = b""
            for update in updates:
                i, first, text, tokens, scores = self._news(update)
                logprobs = self.scored(i, tokens, scores) if self._logprobs and tokens else None
                data += self.chunks(i, first, text, logprobs, None if update.finish is None else update.finish.type)
            if data:
                yield data
        if self._include_usage:
            yield self._head + b'],"usage":' + _encode(self.usage()) + b"}\n\n"
        yield DONE

    def _news(self, update: Update) -> tuple[int, bool, str, Sequence[int], LogprobList]:
        """Return the choice's index, whether this is its first update, and its new text, tokens and scores.

        An echo and the scores of the prompt come before the first of them.
        """
        i = update.prompt * self._n + update.choice
        self._num_completion += len(update.token_ids)
        if update.choice == 0:
            self._num_cached[update.prompt] = update.num_cached_tokens
        if i in self._started:
            return i, False, update.text, update.token_ids, update.logprobs
        self._started.add(i)
        text = self._echoes[update.prompt] + update.text if self._echoes else update.text
        if update.prompt_logprobs is None:
            return i, True, text, update.token_ids, update.logprobs
        tokens = [*self._generation.requests[update.prompt].prompt_ids, *update.token_ids]
        return i, True, text, tokens, [*update.prompt_logprobs, *update.logprobs]
