"""Answers of OpenAI's endpoints, whole or as a stream. A chunk encodes only the parts that differ between chunks."""

import secrets
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from typing import ClassVar, NamedTuple

import msgspec
from fastapi import Request
from starlette.responses import Response

from sgl_jax.engine.generation import FinishType, Generation, Update
from sgl_jax.engine.messages import TokenLogprobs
from sgl_jax.server.app_state import ServerState
from sgl_jax.server.openai_types import SamplingFields, StreamOptions
from sgl_jax.server.responses import ChatFinish, ChatLogprobs, CompletionLogprobs, PromptTokensDetails, Usage
from sgl_jax.server.sse import DONE, EventStream, json_unless_disconnected

_encode = msgspec.json.encode

_BLOCK = 64  # bytes; padded chunks are multiples of it


class News(NamedTuple):
    """Text, tokens and scores that a choice has gained, an echo and the prompt's before the first of them."""

    index: int  # the choice's
    prompt: int
    first: bool  # nothing of the choice came before
    text: str
    tokens: Sequence[int]
    scores: Sequence[TokenLogprobs | None]  # None: for the first token of a prompt
    finish: FinishType | None


class OpenAIAnswer[Logprobs: ChatLogprobs | CompletionLogprobs](ABC):
    """Answer to one request on its way out. Choice i of prompt p has index p * n + i."""

    id_prefix: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(self, state: ServerState, body: SamplingFields, generation: Generation, logprobs: bool):
        self.tokenizer, self.generation = state.tokenizer, generation
        self.stream = bool(body.stream)
        self.echoes: Sequence[str] = ()  # by prompt, what its choices begin with; empty: nothing
        self.id = f"{self.id_prefix}-{uuid.uuid4().hex}"
        self.created, self.model = int(generation.created), body.model or state.model_name
        self._logprobs = logprobs
        self._n = generation.requests[0].params.n
        self._started: set[int] = set()
        self._num_completion = 0
        self._num_cached = [0] * len(generation.requests)
        self._options = body.stream_options or StreamOptions()

    async def respond(self, request: Request) -> Response:
        request.state.generation = self.generation
        if self.stream:
            return EventStream(self.generation, self.events())
        return await json_unless_disconnected(request, self.whole())

    @abstractmethod
    def scored(self, news: News) -> Logprobs | None:
        """Return the log probabilities to hand out with the news, in the form of the endpoint."""

    @abstractmethod
    def answer(self, whole: list[News], scores: list[Logprobs | None]) -> msgspec.Struct:
        """Make the whole answer from all news of each choice."""

    @abstractmethod
    def chunks(self, news: News, scores: Logprobs | None) -> bytes:
        """Make the chunks of an update of a choice."""

    def chunk(self, index: int, payload: bytes, logprobs: Logprobs | None, finish: ChatFinish | None) -> bytes:
        """Encode a chunk as a server-sent event; `payload` is the name and value of the choice's own field, in JSON."""
        parts = index, payload, _encode(logprobs), _encode(finish)
        data = self._head + b'{"index":%d,%b,"logprobs":%b,"finish_reason":%b}' % parts + self._tail
        if self._options.continuous_usage_stats:
            data += b',"usage":' + _encode(self.usage())
        if self._options.include_obfuscation:
            data += b',"obfuscation":"'
            data += secrets.token_hex(_BLOCK).encode()[: -(len(data) + len(b'"}\n\n')) % _BLOCK] + b'"'
        return data + b"}\n\n"

    def usage(self) -> Usage:
        """Count tokens. A prompt counts once, however many choices it has; the tokens of every choice count."""
        num_prompt = self.generation.num_prompt_tokens
        cached = PromptTokensDetails(sum(self._num_cached))
        return Usage(num_prompt, self._num_completion, num_prompt + self._num_completion, cached)

    async def whole(self) -> object:
        """Return the answer when it has ended."""
        count = self._n * len(self.generation.requests)
        parts: list[list[News]] = [[] for _ in range(count)]
        async for updates in self.generation.updates():
            for update in updates:
                news = self._news(update)
                parts[news.index].append(news)
        whole = [_joined(i, i // self._n, news) for i, news in enumerate(parts)]
        logprobs = [self.scored(news) if self._logprobs else None for news in whole]
        return self.answer(whole, logprobs)

    async def events(self) -> AsyncIterator[bytes]:
        """Yield the answer as server-sent events, as it comes."""
        head = {"id": self.id, "object": self.chunk_object, "created": self.created, "model": self.model}
        self._head = b"data: " + _encode(head)[:-1] + b',"choices":['
        only_last = self._options.include_usage and not self._options.continuous_usage_stats
        self._tail = b'],"usage":null' if only_last else b"]"
        async for updates in self.generation.updates():
            data = b""
            for update in updates:
                news = self._news(update)
                data += self.chunks(news, self.scored(news) if self._logprobs else None)
            if data:
                yield data
        if self._options.include_usage:
            yield self._head + b'],"usage":' + _encode(self.usage()) + b"}\n\n"
        yield DONE

    def _news(self, update: Update) -> News:
        """Count an update's tokens, and put the echo and the scores of the prompt before the first one of its choice."""
        i = update.prompt * self._n + update.choice
        self._num_completion += len(update.token_ids)
        if update.choice == 0:
            self._num_cached[update.prompt] = update.num_cached_tokens
        first = i not in self._started
        text, tokens, scores = update.text, update.token_ids, update.logprobs
        if first:
            self._started.add(i)
            text = self.echoes[update.prompt] + text if self.echoes else text
            if update.prompt_logprobs is not None:
                tokens = [*self.generation.requests[update.prompt].prompt_ids, *tokens]
                scores = [*update.prompt_logprobs, *scores]
        finish = None if update.finish is None else update.finish.type
        return News(i, update.prompt, first, text, tokens, scores, finish)


def _joined(index: int, prompt: int, parts: Sequence[News]) -> News:
    """Return all news of a choice as one."""
    text = "".join(news.text for news in parts)
    tokens = [token for news in parts for token in news.tokens]
    scores = [score for news in parts for score in news.scores]
    return News(index, prompt, True, text, tokens, scores, (parts[-1].finish if parts else None) or "abort")
