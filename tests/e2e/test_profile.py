"""A profile of the real engine: its files name the stages of so many steps."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from exact import GREEDY, Build

from sgl_jax.engine.core import Core
from sgl_jax.engine.messages import Generate, GetProfile, ProfileAnswer, ProfileStatus, StartProfile, StopProfile
from sgl_jax.request import SamplingParams

PROMPT = list(range(5, 14))


@pytest.fixture(scope="module")
def core(build: Build, stories260k: Path) -> Core:
    return build(stories260k, max_running_requests=2, chunked_prefill_size=4, context_length=64, max_total_tokens=512)


def run(core: Core, max_tokens: int) -> None:
    core.handle(Generate(1, PROMPT, SamplingParams(max_tokens=max_tokens, **GREEDY)))
    while core.busy:
        core.step()


def ask(core: Core, command: StartProfile | StopProfile | GetProfile) -> ProfileStatus:
    core.handle(command)
    (answer,) = [event for event in core.step() if isinstance(event, ProfileAnswer)]
    return answer.status


def spans(status: ProfileStatus) -> list[dict]:
    (path,) = [file for file in status.files if file.endswith(".trace.json.gz")]
    events = json.loads(gzip.decompress(Path(path).read_bytes()))["traceEvents"]
    return sorted((event for event in events if event.get("ph") == "X"), key=lambda event: event["ts"])


def test_a_profile_of_four_steps(core: Core, tmp_path: Path) -> None:
    core.handle(StartProfile(1, str(tmp_path), num_steps=4))
    run(core, max_tokens=10)
    status = ask(core, GetProfile(2))
    assert (status.running, status.steps_done) == (False, 4)
    assert sorted(Path(file).suffix for file in status.files) == [".gz", ".pb"]
    recorded = spans(status)
    stages = [span["name"] for span in recorded if span["name"] in ("plan", "dispatch", "collect", "process")]
    # Overlapped: the fifth step is launched before the fourth is collected, and that ends the profile.
    assert stages == ["plan", "dispatch"] + ["plan", "dispatch", "collect", "process"] * 4
    numbers = [int(span["args"]["step_num"]) for span in recorded if span["name"] == "step"]
    assert [number - numbers[0] for number in numbers] == [0, 1, 2, 3, 4]
