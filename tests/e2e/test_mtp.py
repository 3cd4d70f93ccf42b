"""Tests of MTP layers that draft for their own model: the output is the reference's, and drafts are those of plain formulas."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import reference_bailing
from exact import ALL_PROMPTS, GREEDY, Build, assert_oracle, assert_reference
from safetensors.numpy import load_file, save_file

from checkpoints import with_mtp_layer
from sgl_jax.engine.core import Core
from sgl_jax.runtime.device_state import DeviceState
from sgl_jax.runtime.programs import STATE
from sgl_jax.runtime.runner import ModelRunner
from simulated import Client

W = 4


def start(build: Build, folder: Path, config: dict, tensors: dict[str, np.ndarray], **options) -> Core:
    """Start the model with an MTP layer. One decoding row speculates: chunks of few tokens hold its drafts."""
    config, tensors = with_mtp_layer(config, tensors)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    drafting = {"speculative_algorithm": "NEXTN", "speculative_num_draft_tokens": W}
    return build(folder, ALL_PROMPTS, speculative_disable_by_batch_size=1, **drafting, **options)


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe"])
def test_the_output_is_that_of_the_model_alone(
    build: Build, checkpoint: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    source = checkpoint(name)
    shutil.copy(source / "oracle.json", tmp_path)
    config, tensors = json.loads((source / "config.json").read_text()), load_file(source / "model.safetensors")
    core = start(build, tmp_path, config, tensors, page_size=16)
    assert_oracle(core, tmp_path)
    assert core.runner.compiles_after_ready == 0


def test_drafts_are_those_of_the_formulas(build: Build, tmp_path: Path) -> None:
    config, tensors = reference_bailing.V2, reference_bailing.checkpoint(reference_bailing.V2, seed=7)
    core = start(build, tmp_path, config, tensors, page_size=4, disable_overlap_schedule=True)
    prompts = [np.random.default_rng(n).integers(0, config["vocab_size"], n).tolist() for n in (1, 7, 33)]
    assert_reference(core, prompts, functools.partial(reference_bailing.logprobs, tensors, config), 8)

    config, tensors = with_mtp_layer(config, tensors)
    client, checked = Client(core), 0
    for key, prompt in enumerate(prompts):
        client.submit(key, prompt, max_tokens=6, **GREEDY)
        answer = client.answers[key]
        while core.busy:
            client.step()
            if answer.reason is None:
                drafts, gaps = reference_bailing.mtp_drafts(tensors, config, [*prompt, *answer.tokens], W - 1)
                sure = next((i for i, gap in enumerate(gaps) if gap < 1e-3), W - 1)
                assert drafts_of(core, answer.request.row)[:sure] == drafts[:sure]
                checked += sure
    assert checked > 30


def drafts_of(core: Core, row: int) -> list[int]:
    assert isinstance(core.runner, ModelRunner)
    state = core.runner._values[STATE]
    assert isinstance(state, DeviceState)
    return np.asarray(state.draft)[row].tolist()
