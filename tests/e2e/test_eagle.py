"""Tests of EAGLE heads inside the engine against references: chains of drafts, how many are accepted, and the output."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from exact import Build

from messages import says
from sgl_jax.engine.core import Core
from sgl_jax.runtime.buckets import Bucket
from sgl_jax.runtime.device_state import DeviceState
from sgl_jax.runtime.programs import STATE
from sgl_jax.runtime.runner import ModelRunner
from simulated import Client

HEADS = {
    "eagle1-llama": "EAGLE",
    "eagle1-llama-nobias": "EAGLE",
    "eagle3-llama": "EAGLE3",
    "eagle3-qwen3": "EAGLE3",
    "eagle3-llama-fullvocab": "EAGLE3",
}
K = 4
EAGLE = Path(__file__).parents[1] / "data" / "eagle"


def start(build: Build, folder: Path, algorithm: str, **options) -> Core:
    return build(
        folder / "target",
        Bucket(32, 4),
        page_size=4,
        context_length=256,
        speculative_algorithm=algorithm,
        speculative_draft_model_path=str(folder / "draft"),
        speculative_num_draft_tokens=K + 1,
        **options,
    )


def drafts_of(core: Core, row: int) -> list[int]:
    assert isinstance(core.runner, ModelRunner)
    state = core.runner._values[STATE]
    assert isinstance(state, DeviceState)
    return np.asarray(state.draft)[row].tolist()


@pytest.mark.parametrize(("name", "algorithm"), HEADS.items())
def test_chains_of_drafts_are_those_of_the_reference(build: Build, name: str, algorithm: str) -> None:
    folder = EAGLE / name
    core = start(build, folder, algorithm, disable_overlap_schedule=True)
    for key, case in enumerate(json.loads((folder / "oracle.json").read_text())["cases"]):
        client = Client(core)
        client.submit(key, case["prompt_ids"], max_tokens=len(case["greedy_ids"]), ignore_eos=True, temperature=0.0)
        chains = {chain["committed"]: chain for chain in case["draft_chains"]}
        answer, rounds, seen = client.answers[key], [], 0
        while answer.reason is None:
            before = len(case["prompt_ids"]) + len(answer.tokens)
            client.step()
            committed = len(case["prompt_ids"]) + len(answer.tokens)
            if len(answer.tokens) > 1 and answer.reason is None:
                rounds.append([before, committed - before - 1])
            if committed in chains and answer.reason is None and answer.tokens:
                chain = chains[committed]
                sure = next((i for i, gap in enumerate(chain["gaps"]) if gap < 0.01), K)
                assert drafts_of(core, answer.request.row)[:sure] == chain["draft_ids"][:sure]
                seen += 1
        assert answer.tokens == case["greedy_ids"]
        assert seen > 0
        assert rounds == case.get("rounds_committed_accepted", rounds)[: len(rounds)]


def test_a_head_that_is_never_right_is_warned_of_by_name(build: Build, caplog: pytest.LogCaptureFixture) -> None:
    folder = EAGLE / "eagle3-llama"
    client = Client(start(build, folder, "EAGLE3", speculative_disable_by_batch_size=4))
    for key in range(3):
        client.submit(key, [1, 30 + key], max_tokens=40, ignore_eos=True, temperature=1.0, seed=key)
    client.run()
    stats = client.stats[-1]
    assert (stats.drafted_tokens, stats.accepted_per_position) == (K * stats.draft_steps, [0] * K)
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert [says(warning, f"0 of … {folder / 'draft'} … 5%") for warning in warnings] == [True]
