"""A step of DeepSeek-V3's attention as a TPU would run it: latent vectors change in place, and nothing of the size of the pool
is made beside them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import tpu_programs as programs
from tpu_programs import StepProgram

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"),
    pytest.mark.timeout(1200),
]

# As its config, but for the number of layers and experts: two dense layers, as a scan and a list would have them.
CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 2,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "max_position_embeddings": 163840,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> StepProgram:
    folder: Path = tmp_path_factory.mktemp("deepseek-v3")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return programs.step_program(str(folder), "v6e-4", None, 16)


def test_a_launch_takes_rows_of_whole_lane_tiles(step: StepProgram) -> None:
    _, heads, planes, _, width = step.args[2][0].sharding.shard_shape(step.args[2][0].shape)
    assert (heads, planes, width) == (1, 1, 640)


def test_the_pool_changes_in_place(step: StepProgram) -> None:
    assert [output for output, _ in step.module.aliased] == list(range(step.donated_leaves()))
    assert step.aliased_bytes >= step.pool_bytes
    assert programs.pool_copies(step) == []


def test_what_a_step_needs_besides_is_small(step: StepProgram) -> None:
    assert step.temp_bytes < programs.TEMP_FRACTION * step.pool_bytes


def test_a_layer_sums_twice_over_the_devices(step: StepProgram) -> None:
    activations, others = programs.sums(step)
    assert activations == 2 * step.num_layers + 1
    assert sum(others) <= programs.SMALL
