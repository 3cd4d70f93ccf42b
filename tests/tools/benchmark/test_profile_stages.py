"""Where a profile's time went: intervals, sums, the printed table, and files that are no profile."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import profile_stages
import pytest
from profile_stages import (
    DEVICE_STAGES,
    OTHER,
    Profile,
    StageTime,
    find_profile,
    milliseconds,
    read_profile,
    stage_of,
    table,
)

MS = 1e6  # ns

# Two steps. On the device a loop of attention holds its own operations, and a copy of no stage runs beside the mlp.
PROFILE = Profile(
    host={
        "plan": [(0.0, 1 * MS), (10 * MS, 10.5 * MS)],
        "dispatch": [(1 * MS, 2 * MS), (11 * MS, 12 * MS)],
        "collect": [(2 * MS, 9 * MS), (12 * MS, 19 * MS)],
        "process": [(9 * MS, 9.25 * MS), (19 * MS, 19.25 * MS)],
    },
    device={stage: [] for stage in DEVICE_STAGES}
    | {
        "attention": [(3 * MS, 5 * MS), (3 * MS, 4 * MS), (4.5 * MS, 5 * MS)],
        "mlp": [(5 * MS, 7 * MS), (13 * MS, 14 * MS)],
        OTHER: [(6 * MS, 7.5 * MS), (14 * MS, 14.5 * MS)],
    },
)


@pytest.mark.parametrize(
    ("scope", "stage"),
    [
        ("jit(step)/jit(main)/attention/dot_general", "attention"),
        ("jit(step)/while/body/mlp/logistic", "mlp"),
        ("jit(step)/prompt_logprobs/logits/dot_general", "prompt_logprobs"),
        ("jit(step)/attentions/add", OTHER),
        ("", OTHER),
    ],
)
def test_the_outermost_stage_of_a_path(scope: str, stage: str) -> None:
    assert stage_of(scope) == stage


def test_sums_by_stage() -> None:
    assert PROFILE.host_times()[0] == StageTime("plan", 2, 1.5)
    assert milliseconds(*PROFILE.device.values()) == 2 + 2.5 + 1.5
    assert PROFILE.device_times() == [
        StageTime("attention", 3, 2.0),
        StageTime("mlp", 2, 3.0),
        StageTime(OTHER, 2, 1.0),  # time beside the mlp is the mlp's
    ]


def test_the_printed_table() -> None:
    assert table(PROFILE) == "\n".join(
        [
            "                            count        ms   ms a step    share",
            "host",
            "  plan                          2       1.5       0.750",
            "  dispatch                      2       2.0       1.000",
            "  collect                       2      14.0       7.000",
            "  process                       2       0.5       0.250",
            "device                                  6.0       3.000",
            "  attention                     3       2.0       1.000    33.3%",
            "  mlp                           2       3.0       1.500    50.0%",
            "  other                         2       1.0       0.500    16.7%",
        ]
    )


@pytest.mark.parametrize("runs", [0, 1])
def test_of_two_programs_with_one_name_the_one_that_ran_gives_the_stages(runs: int, tmp_path: Path) -> None:
    def twin(stage: str, num_products: int) -> Callable[[jax.Array], jax.Array]:
        def step(x: jax.Array) -> jax.Array:
            with jax.named_scope(stage):
                for _ in range(num_products):
                    x = jnp.tanh(x @ x)
            return x

        return jax.jit(step)

    x = jnp.eye(64)
    stages = ("attention", "mlp")
    programs = [twin(stages[0], 3).lower(x).compile(), twin(stages[1], 5).lower(x).compile()]
    with jax.profiler.trace(str(tmp_path)):
        programs[runs](x).block_until_ready()
    counts = {stage: count for stage, count, _ in read_profile(find_profile(tmp_path)).device_times()}
    assert stages[runs] in counts
    assert stages[1 - runs] not in counts


def test_the_newest_profile_of_a_folder(tmp_path: Path) -> None:
    for seconds, name in ((20, "b"), (30, "a"), (10, "c")):
        file = tmp_path / name / "vm.xplane.pb"
        file.parent.mkdir()
        file.write_bytes(b"")
        os.utime(file, (seconds, seconds))
    assert find_profile(tmp_path) == tmp_path / "a" / "vm.xplane.pb"
    assert find_profile(tmp_path / "c" / "vm.xplane.pb").parent.name == "c"


def test_what_is_no_profile_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.xplane.pb").write_bytes(b"\x0b not a profile")
    with pytest.raises(ValueError, match=r"x\.xplane\.pb is not a profile"):
        read_profile(tmp_path / "x.xplane.pb")
    assert profile_stages.main([str(tmp_path)]) == 1
    assert "is not a profile" in capsys.readouterr().err
    assert profile_stages.main([str(tmp_path / "none")]) == 1
    assert "no .xplane.pb file there" in capsys.readouterr().err
    assert profile_stages.main([str(tmp_path), "--perfetto"]) == 2
    assert capsys.readouterr().err == "profile_stages: error: --perfetto is not a flag; --help lists them all\n"
