"""Without a terminal, loading prints at most one line per tenth, and a last line with the speed."""

from __future__ import annotations

import logging

import pytest

from messages import says
from sgl_jax.observability.progress import weight_progress

LOGGER = logging.getLogger("test_progress")


def test_one_line_per_tenth_and_a_last_one(caplog, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    with caplog.at_level(logging.INFO), weight_progress(LOGGER, 2000 << 20) as report:
        for step in range(1, 101):
            report(step / 100, step * (20 << 20))
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(" ", 2)[-1] for line in lines[:-1]] == [f"{tenth}0 %" for tenth in range(1, 10)]
    assert says(lines[-1], "2.0 GiB … GB/s")


def test_a_terminal_gets_a_bar_instead(caplog, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with caplog.at_level(logging.INFO), weight_progress(LOGGER, 100) as report:
        report(0.5, 50)
        report(1.0, 100)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["Weights loaded"]


def test_a_failed_load_claims_nothing(caplog):
    with caplog.at_level(logging.INFO), pytest.raises(OSError, match="gone"), weight_progress(LOGGER, 100):
        raise OSError("gone")
    assert not caplog.records
