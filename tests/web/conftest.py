"""A browser for tests of the pages, and a server for them to show."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Dialog, Page, Request

# The server around a fake engine (live_server.py) is that of the server's tests.
sys.path.append(str(Path(__file__).parents[1] / "server"))

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_PATIENCE_MS = 30_000  # for anything to appear; what is there is found at once


@pytest.fixture(scope="module")  # not longer: while it runs, no other test may start an event loop in this thread
def browser() -> Iterator[Browser]:
    """A Chromium without a window."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; `make env-dev` does it")
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(_NAMES)} is installed")
    with sync_api.sync_playwright() as playwright:
        sandbox = [] if os.geteuid() else ["--no-sandbox"]  # root has no sandbox
        started = playwright.chromium.launch(executable_path=found, args=sandbox)
        yield started
        started.close()


class Visits:
    """Opens pages, each in a profile of its own, and keeps what no page may do: errors, dialogs, requests to elsewhere."""

    def __init__(self, browser: Browser):
        self._browser = browser
        self._profiles: list[BrowserContext] = []
        self.problems: list[str] = []

    def open(self, url: str, **context: Any) -> Page:
        """Open a page. `context` is that of Playwright's `new_context`, such as viewport and color_scheme."""
        profile = self._browser.new_context(**context)
        self._profiles.append(profile)
        profile.set_default_timeout(_PATIENCE_MS)
        origin = "/".join(url.split("/")[:3])

        def asked(request: Request) -> None:
            if not request.url.startswith((origin, "data:", "blob:")):
                self.problems.append(f"request to {request.url}")

        def said(message: ConsoleMessage) -> None:
            if message.type in ("error", "warning"):
                self.problems.append(message.text)

        def opened(dialog: Dialog) -> None:
            self.problems.append(f"dialog: {dialog.message}")
            dialog.dismiss()

        page = profile.new_page()
        page.on("dialog", opened)
        page.on("request", asked)
        page.on("console", said)
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("crash", lambda _: self.problems.append("the page crashed"))
        page.goto(url)
        return page

    def forgive(self, *texts: str) -> None:
        """Forget problems that a test provoked: each text must be part of one, such as a status code."""
        for text in texts:
            assert any(text in problem for problem in self.problems), (text, self.problems)
        self.problems = [problem for problem in self.problems if not any(text in problem for text in texts)]

    def close(self) -> None:
        for profile in self._profiles:
            profile.close()


@pytest.fixture
def visits(browser: Browser) -> Iterator[Visits]:
    """Pages for one test, which fails if one of them did what it may not."""
    opened = Visits(browser)
    yield opened
    opened.close()
    assert opened.problems == []


@pytest.fixture
def visit(visits: Visits) -> Callable[..., Page]:
    return visits.open
