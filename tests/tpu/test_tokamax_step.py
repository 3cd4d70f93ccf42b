"""A step with the backend `tokamax`, compiled for a TPU: its pool has an order of its own, and changes in place."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import tpu_programs as programs
from tpu_programs import StepProgram

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"),
    pytest.mark.skipif(importlib.util.find_spec("tokamax") is None, reason="tokamax is not installed"),
    pytest.mark.timeout(1200),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 32768,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 16384,
    "rope_theta": 1000000,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> StepProgram:
    folder: Path = tmp_path_factory.mktemp("qwen3")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return programs.step_program(str(folder), "v6e-4", "tokamax", 2048)


def test_devices_hold_the_heads_of_their_own(step: StepProgram) -> None:
    _, page_size, pairs, packing, width = step.args[2][0].sharding.shard_shape(step.args[2][0].shape)
    assert (page_size, pairs, packing, width) == (128, 2, 2, 128)


def test_the_pool_changes_in_place(step: StepProgram) -> None:
    assert [output for output, _ in step.module.aliased] == list(range(step.donated_leaves()))
    assert step.aliased_bytes >= step.pool_bytes
    assert programs.pool_copies(step) == []


def test_its_kernels_are_in_each_layer(step: StepProgram) -> None:
    kernels = [each.name for each in step.module.instructions() if each.opcode == "custom-call" and "RPA" in each.name]
    assert len(kernels) == 3 * step.num_layers * step.bucket.num_parts  # for decoding, equally long and other rows
