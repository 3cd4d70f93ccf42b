"""A profile of the real engine: its files name the stages, and the device's time goes to stages too."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import profile_stages
import pytest
from exact import GREEDY, Build
from profile_stages import find_profile, read_profile

from sgl_jax.engine.core import Core
from sgl_jax.engine.messages import Generate, GetProfile, ProfileAnswer, ProfileStatus, StartProfile, StopProfile
from sgl_jax.request import SamplingParams

PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def core(build: Build, stories260k: Path, tmp_path_factory: pytest.TempPathFactory) -> Core:
    """Start a core whose programs come from the compile cache, where another process has put them."""
    small = {"max_running_requests": 1, "chunked_prefill_size": 1, "context_length": 64, "max_total_tokens": 512}
    same = {"compilation_cache_dir": str(tmp_path_factory.mktemp("cache")), "dtype": "float32", "random_seed": 0}
    options = small | same | {"device": "cpu"}
    code = f"import sgl_jax; sgl_jax.Engine(model_path={str(stories260k)!r}, **{options}).shutdown()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=200, capture_output=True)
    return build(stories260k, **options)


def run(core: Core, max_tokens: int) -> None:
    core.handle(Generate(1, PROMPT, SamplingParams(max_tokens=max_tokens, **GREEDY)))
    while core.busy:
        core.step()


def ask(core: Core, command: StartProfile | StopProfile | GetProfile) -> ProfileStatus:
    """Return the answer, which for a stop comes when the profile is written."""
    core.handle(command)
    answers = [event for event in core.step() if isinstance(event, ProfileAnswer)]
    while core.busy:
        answers += [event for event in core.step() if isinstance(event, ProfileAnswer)]
    (answer,) = answers
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
    # With overlap the fifth step is launched before the fourth is collected, which ends the profile. A thread stops it
    # while the engine goes on, so further steps may be in it.
    expected = ["plan", "dispatch"] + ["plan", "dispatch", "collect", "process"] * 4
    assert stages[: len(expected)] == expected
    numbers = [int(span["args"]["step_num"]) for span in recorded if span["name"] == "step"]
    assert [number - numbers[0] for number in numbers][:5] == [0, 1, 2, 3, 4]


def test_where_the_time_went(core: Core, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    core.handle(StartProfile(1, str(tmp_path)))
    run(core, max_tokens=6)
    status = ask(core, StopProfile(2))
    profile = read_profile(find_profile(Path(status.output_dir)))
    num_steps = 3 + 5  # three prompt tokens one by one; the last of them gives the first token
    assert status.steps_done == num_steps
    assert {stage: len(spans) for stage, spans in profile.host.items() if stage != "plan"} == {
        "dispatch": num_steps,
        "collect": num_steps,
        "process": num_steps,
    }
    counts = {stage: count for stage, count, _ in profile.device_times()}  # a fused operation counts for one stage
    assert counts["logits"] >= num_steps
    assert counts["sample"] >= num_steps
    for stage in ("attention", "mlp"):
        assert counts[stage] >= num_steps * 5  # layers
    assert profile_stages.main([str(tmp_path)]) == 0
    assert f"{num_steps} steps collected" in capsys.readouterr().out
