from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from live_server import LiveServer

from fakes.fake_core import FakeCore


@pytest.fixture(scope="module")
def live() -> Iterator[LiveServer]:
    with LiveServer() as server:
        yield server


@pytest.fixture(scope="module")
def slow() -> Iterator[LiveServer]:
    """Serve with 5 ms per step, so that tokens come one by one."""
    with LiveServer(lambda: FakeCore(step_seconds=0.005)) as server:
        yield server


@pytest.fixture(scope="module")
def repeating() -> Iterator[LiveServer]:
    """Serve a model whose answer is the last message, with thoughts and calls in Qwen's format."""
    template = str(Path(__file__).parent / "tool_template.jinja")
    with LiveServer(lambda: FakeCore(step_seconds=0.001), chat_template=template, reasoning_parser="qwen3") as server:
        yield server


@pytest.fixture(scope="module")
def http(live: LiveServer) -> Iterator[httpx.Client]:
    with live.http() as client:
        yield client


@pytest.fixture(scope="module")
def client(live: LiveServer) -> Iterator[openai.OpenAI]:
    with live.openai() as client:
        yield client


@pytest.fixture(scope="module")
def slow_client(slow: LiveServer) -> Iterator[openai.OpenAI]:
    with slow.openai() as client:
        yield client


@pytest.fixture(autouse=True)
def empty_prefix_caches(request: pytest.FixtureRequest) -> None:
    """The tests of a file have one server: none finds the prompts of another in its cache."""
    for name in ("live", "slow"):
        if name in request.fixturenames:
            server: LiveServer = request.getfixturevalue(name)
            httpx.post(f"{server.url}/flush_cache").raise_for_status()
