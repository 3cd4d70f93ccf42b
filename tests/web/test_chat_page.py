"""Tests of the chat page in a browser."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest
from live_server import LiveServer

if TYPE_CHECKING:
    from playwright.sync_api import Page


@pytest.fixture(scope="module")
def live() -> Iterator[LiveServer]:
    with LiveServer() as server:
        yield server


def test_loads(visit: Callable[..., Page], live: LiveServer) -> None:
    assert visit(live.url).title() == "Chat – sgl_jax"
    import asyncio

    print("has loop", asyncio._get_running_loop())
