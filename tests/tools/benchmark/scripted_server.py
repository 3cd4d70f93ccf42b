"""A server whose answers and timings are written in the test: token k of an answer comes ttft + k x itl after asking.

Speaks the native API and OpenAI's, over a real socket, on the clock of the loop it runs in.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web


@dataclass
class Script:
    """Behaviour of the server; `request` counts the generation calls from 0, in order of arrival."""

    ttft_s: Callable[[int], float] = lambda request: 0.1
    itl_s: Callable[[int], float] = lambda request: 0.01
    tokens_per_event: int = 1
    token: str = " a"
    cached_tokens: Callable[[int], int] | None = lambda request: 0  # None: not told
    fails: Callable[[int], tuple[int, str] | None] = lambda request: None  # an HTTP status and a message
    info: dict[str, Any] = field(default_factory=dict)  # the body of /get_server_info
    breaks: Callable[[int], str] = lambda request: ""  # after the first token: a key of _BREAKS; "" does not break
    usage_each_event: bool = False  # OpenAI's streams: the count so far is in every event
    metrics: list[str] = field(default_factory=list)  # the answers of /metrics, in turn; then it is not there
    refused: dict[str, list[tuple[int, str]]] = field(default_factory=dict)  # by path: what the first calls get


class ScriptedServer:
    """`received` holds (path, body) of every call in order, `headers` theirs; `url` is where it listens."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.received: list[tuple[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.url = ""
        self._calls = 0

    @asynccontextmanager
    async def running(self) -> AsyncIterator[ScriptedServer]:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._handle)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{port}"
        try:
            yield self
        finally:
            await runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.json() if request.can_read_body else None
        self.received.append((request.path, body))
        self.headers.append(dict(request.headers))
        if refusals := self.script.refused.get(request.path):
            status, message = refusals.pop(0)
            return web.json_response({"error": {"message": message}}, status=status)
        match request.path:
            case "/generate" | "/v1/completions" | "/v1/chat/completions":
                return await self._generate(request, body)
            case "/get_server_info":
                return web.json_response(self.script.info)
            case "/metrics" if self.script.metrics:
                return web.Response(text=self.script.metrics.pop(0))
            case "/v1/models":
                return web.json_response({"object": "list", "data": [{"id": "scripted", "object": "model"}]})
            case "/health" | "/ready" | "/flush_cache" | "/start_profile" | "/stop_profile":
                return web.json_response({"status": "ok"})
        return web.json_response({"error": {"message": f"no route {request.path}"}}, status=404)

    async def _generate(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        number, self._calls = self._calls, self._calls + 1
        if failure := self.script.fails(number):
            return web.json_response({"error": {"message": failure[1]}}, status=failure[0])
        native = request.path == "/generate"
        chat = request.path == "/v1/chat/completions"
        prompts = _prompts(body, native, chat)
        sampling = body.get("sampling_params", {}) if native else body
        count = sampling.get("max_new_tokens", sampling.get("max_completion_tokens", sampling.get("max_tokens")))
        stream = body.get("stream", False)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        if stream:
            await response.prepare(request)
            if chat:
                role = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}
                await response.write(f"data: {json.dumps(role)}\n\n".encode())
        usage = self._usage(number, prompts, count)
        done = 0
        while done < count:
            await asyncio.sleep(self.script.ttft_s(number) if done == 0 else 0)
            step = min(self.script.tokens_per_event, count - done) if done else 1
            if done:
                await asyncio.sleep(self.script.itl_s(number) * step)
            done += step
            if not stream:
                continue
            for index, prompt_len in enumerate(prompts):
                text = self.script.token * (done if native else step)
                event = (
                    {"text": text, "meta_info": self._meta(number, prompt_len, done, count)}
                    if native
                    else {"choices": [_choice(index, text, chat, done == count)]}
                )
                if native and len(prompts) > 1:
                    event["index"] = index
                if not native and self.script.usage_each_event:
                    event["usage"] = self._usage(number, prompts, done)
                await response.write(f"data: {json.dumps(event)}\n\n".encode())
            if how := self.script.breaks(number):
                await response.write(_BREAKS[how])
                if how == "dropped" and request.transport is not None:
                    request.transport.abort()
                return response
        text = self.script.token * count
        if stream:
            if not native and body.get("stream_options", {}).get("include_usage"):
                await response.write(f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n".encode())
            await response.write(b"data: [DONE]\n\n")
            await response.write_eof()
            return response
        if native:
            answers = [{"text": text, "meta_info": self._meta(number, n, count, count)} for n in prompts]
            return web.json_response(answers if isinstance(_native_prompt(body)[0], list) else answers[0])
        message = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        choices = [{"index": i, "finish_reason": "length"} | message for i in range(len(prompts))]
        return web.json_response({"choices": choices, "usage": usage})

    def _meta(self, number: int, prompt_len: int, done: int, count: int) -> dict[str, Any]:
        meta = {"id": str(number), "prompt_tokens": prompt_len, "completion_tokens": done}
        meta["finish_reason"] = {"type": "length", "length": count} if done == count else None
        if self.script.cached_tokens is not None:
            meta["cached_tokens"] = self.script.cached_tokens(number)
        return meta

    def _usage(self, number: int, prompts: list[int], count: int) -> dict[str, Any]:
        prompt, completion = sum(prompts), count * len(prompts)
        usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        if self.script.cached_tokens is None:
            return usage
        return usage | {"prompt_tokens_details": {"cached_tokens": self.script.cached_tokens(number)}}


# Bytes sent when a stream breaks; the connection is closed after them.
_BREAKS = {
    "ended": b"",
    "dropped": b"data: {",
    "error": b'data: {"error": {"message": "out of memory"}}\n\ndata: [DONE]\n\n',
    "aborted": b'data: {"text": " a", "meta_info": {"finish_reason": {"type": "abort", "message": "stopped"}}}\n\n'
    b"data: [DONE]\n\n",
    "gibberish": b"data: <html>\n\n",
}


def _native_prompt(body: dict[str, Any]) -> Any:
    return body["input_ids"] if body.get("input_ids") is not None else body["text"]


def _prompts(body: dict[str, Any], native: bool, chat: bool) -> list[int]:
    """The length of each prompt: token ids, or words when it is text."""
    if chat:
        return [sum(len(message["content"].split()) for message in body["messages"])]
    prompt = _native_prompt(body) if native else body["prompt"]
    if isinstance(prompt, str):
        return [len(prompt.split())]
    if isinstance(prompt[0], int):
        return [len(prompt)]
    return [len(one.split()) if isinstance(one, str) else len(one) for one in prompt]


def _choice(index: int, text: str, chat: bool, last: bool) -> dict[str, Any]:
    said = {"delta": {"content": text}} if chat else {"text": text}
    return {"index": index, "finish_reason": "length" if last else None} | said
