"""Progress of a start: seconds that add up, few lines without a terminal, one live line on a terminal."""

from __future__ import annotations

import logging

import pytest

from messages import says
from sgl_jax.observability import progress
from sgl_jax.observability.progress import LaunchProgress, launch_progress

LOGGER = logging.getLogger("test_progress")


class Clock:
    now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def start(shown: LaunchProgress, clock: Clock) -> None:
    """Read weights for 20 s and compile three programs, the first one read from the cache."""
    for second in range(1, 21):
        clock.now += 1
        shown.read(second / 20, second * (100 << 20))
        if second == 4:
            shown.compiled("tokens=2 rows=2", cache_hit=True)
    shown.all_read()
    for name in ("tokens=8 rows=8", "load bias"):
        clock.now += 10
        shown.compiled(name, cache_hit=False)


def test_without_a_terminal_lines_are_few_and_their_seconds_count_from_the_start(caplog, monkeypatch, clock):
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    with caplog.at_level(logging.INFO), launch_progress(LOGGER, 3) as shown:
        start(shown, clock)
    assert caplog.messages == [
        "[1/3] tokens=2 rows=2 after 4.0 s (cache hit)",
        *[f"loading weights {percent}%" for percent in (25, 50, 75, 100)],
        "Weights loaded: 2.0 GiB read in 20.0 s (100.0 MiB/s)",
        "[2/3] tokens=8 rows=8 after 30.0 s (cache miss)",
        "[3/3] load bias after 40.0 s (cache miss)",
        caplog.messages[-1],
    ]
    assert says(caplog.messages[-1], "3 programs … 40.0 s … 1 from the cache, 2 compiled … first start")


def test_a_quick_load_is_one_line_and_a_warm_start_names_no_first_one(caplog, clock):
    shown = LaunchProgress(LOGGER, 1)
    with caplog.at_level(logging.INFO):
        for step in range(1, 101):
            shown.read(step / 100, step)
        shown.all_read()
        shown.compiled("tokens=2 rows=2", cache_hit=True)
    weights, _, last = caplog.messages
    assert says(weights, "100 B … 0.0 s")
    assert says(last, "1 programs … 1 from the cache")
    assert "first" not in last


def test_the_live_line_says_how_much_is_done_and_that_it_is_for_the_first_start_only(caplog, clock):
    texts: list[str] = []
    with caplog.at_level(logging.INFO):
        start(LaunchProgress(LOGGER, 3, texts.append), clock)
    assert texts[0] == "loading weights, 0 of 3 programs ready"
    assert texts[10] == "loading weights 45%, 1 of 3 programs ready"
    assert says(texts[-1], "weights loaded, 3 of 3 programs ready … first start")
    assert [line.split(" ")[0] for line in caplog.messages] == ["Weights", "3"]


def test_a_terminal_gets_the_live_line_and_a_failed_start_claims_nothing(caplog, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)

    def fails() -> None:
        with launch_progress(LOGGER, 2) as shown:
            shown.read(0.5, 50)
            shown.compiled("tokens=2 rows=2", cache_hit=False)
            raise OSError("gone")

    with caplog.at_level(logging.INFO), pytest.raises(OSError, match="gone"):
        fails()
    assert not caplog.records
