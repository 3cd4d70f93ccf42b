from __future__ import annotations

from collections.abc import Iterator

import httpx
import openai
import pytest
from live_server import LiveServer

from sgl_jax.testing.fake_core import FakeCore


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
