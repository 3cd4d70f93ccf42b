"""Progress of a start: seconds that add up, few lines without a terminal, one live view on a terminal."""

from __future__ import annotations

import io
import itertools
import logging
import re
from concurrent.futures import Future

import pytest

from messages import says
from sgl_jax.engine.messages import Starting
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


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


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
    with caplog.at_level(logging.INFO), launch_progress(LOGGER, 3, 3) as shown:
        start(shown, clock)
    first, *lines, last = caplog.messages
    assert says(first, "3 programs … cache … first start")
    assert lines == [
        "[1/3] tokens=2 rows=2 after 4.0 s (cache hit)",
        *[f"loading weights {percent}%" for percent in (25, 50, 75, 100)],
        "Weights loaded: 2.0 GiB read in 20.0 s (100.0 MiB/s)",
        "[2/3] tokens=8 rows=8 after 30.0 s (cache miss)",
        "[3/3] load bias after 40.0 s (cache miss)",
    ]
    assert says(last, "3 programs … 40.0 s … 1 from the cache, 2 compiled … first start")


def test_a_quick_load_is_one_line_and_a_warm_start_names_no_first_one(caplog, clock):
    told: list[Starting] = []
    shown = LaunchProgress(LOGGER, 1, 1, told.append)
    with caplog.at_level(logging.INFO):
        for step in range(1, 101):
            shown.read(step / 100, step)
        shown.all_read()
        shown.compiled("tokens=2 rows=2", cache_hit=True)
    weights, _, last = caplog.messages
    assert says(weights, "100 B … 0.0 s")
    assert says(last, "1 programs … 1 from the cache")
    assert "first" not in last
    assert len(told) == 1, "reports come a few times a second, not with each piece"


def test_what_is_told_says_how_much_is_done_how_long_it_takes_and_why(clock):
    told: list[Starting] = []
    start(LaunchProgress(LOGGER, 9, 3, told.append), clock)
    assert told[0] == Starting(0.05, 0, 3, compiles=False, seconds_left=None)
    assert told[9] == Starting(0.5, 1, 3, compiles=False, seconds_left=20)  # 10 s for one of three programs
    assert told[9].programs_text == "1 of 3, about 20 s left"


def test_waiting_for_programs_goes_on_telling_and_raises_their_error(clock, monkeypatch):
    told: list[Starting] = []
    shown, compiled, rounds = LaunchProgress(LOGGER, 2, 2, told.append), Future[None](), itertools.count()

    def wait(futures, timeout):
        clock.now += timeout
        match next(rounds):
            case 1:
                shown.compiled("tokens=2 rows=2", cache_hit=False)
            case 2:
                compiled.set_exception(OSError("no room"))
        return original(futures, 0)

    original = progress.wait
    monkeypatch.setattr(progress, "wait", wait)
    with pytest.raises(OSError, match="no room"):
        shown.wait(compiled)
    assert [(each.num_ready, each.compiles) for each in told] == [(0, False), (1, True)]


def test_a_terminal_shows_weights_programs_and_seconds_left_and_then_nothing_of_it(caplog, monkeypatch, clock):
    screen, told = Terminal(), list[Starting]()
    monkeypatch.setattr("sys.stderr", screen)
    with caplog.at_level(logging.INFO), launch_progress(LOGGER, 9, 4, told.append) as shown:
        shown.compiled("tokens=2 rows=2", cache_hit=False)
        clock.now += 10
        shown.read(0.25, 1 << 20)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert says(text, "weights … 25%")
    assert says(text, "programs … 1 of 4, compiling … first start … about 30 s left")
    assert told == [Starting(0.25, 1, 4, compiles=True, seconds_left=30)]
    assert not caplog.records, "programs have no line beside the live view"
    with caplog.at_level(logging.INFO):
        shown.compiled("tokens=4 rows=4", cache_hit=False)
    assert says(caplog.messages[-1], "[2/9] tokens=4 rows=4"), "but those compiled while serving do"


def test_a_failed_start_on_a_terminal_claims_nothing(caplog, monkeypatch):
    monkeypatch.setattr("sys.stderr", Terminal())

    def fails() -> None:
        with launch_progress(LOGGER, 2, 2) as shown:
            shown.read(0.5, 50)
            shown.compiled("tokens=2 rows=2", cache_hit=False)
            raise OSError("gone")

    with caplog.at_level(logging.INFO), pytest.raises(OSError, match="gone"):
        fails()
    assert not caplog.records


def test_a_start_that_waits_for_no_program_tells_of_weights_alone(caplog, monkeypatch, clock):
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    told: list[Starting] = []
    with caplog.at_level(logging.INFO), launch_progress(LOGGER, 3, 0, told.append) as shown:
        clock.now += 10
        shown.read(0.5, 1 << 20)
    assert says(caplog.messages[0], "programs are compiled beside requests")
    assert told[-1] == Starting(0.5, 0, 0, compiles=False, seconds_left=10)
    assert told[-1].programs_text == "compiled beside requests"


def test_what_is_told_last_is_how_it_ended(clock):
    told: list[Starting] = []
    shown, compiled = LaunchProgress(LOGGER, 1, 1, told.append), Future[None]()
    shown.read(0.97, 1 << 20)
    shown.all_read()
    shown.compiled("tokens=2 rows=2", cache_hit=True)
    compiled.set_result(None)
    shown.wait(compiled)
    assert (told[-1].weights, told[-1].num_ready) == (1.0, 1)
