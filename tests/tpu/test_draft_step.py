"""A wide step that ends with an EAGLE-3 head, as a TPU would run it: the head's layer works in the target's pool, and its passes
cost no more than their products."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter

import pytest
import tpu_programs as programs
from tpu_programs import StepProgram

from sgl_jax.runtime.buckets import Bucket
from sgl_jax.runtime.programs import step_name
from sgl_jax.settings.server_args import ServerArgs

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"),
    pytest.mark.timeout(1200),
]

# Sizes of a head for Qwen3-8B in the layout of AngelSlim.
D, N, K, H, F, V = 4096, 32, 8, 128, 12288, 32000
HEAD = {
    "architectures": ["Eagle3LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": D,
    "num_hidden_layers": 1,
    "num_attention_heads": N,
    "num_key_value_heads": K,
    "head_dim": H,
    "intermediate_size": F,
    "vocab_size": 151936,
    "draft_vocab_size": V,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
W = 4
CASES = [("v6e-1", 8), ("v7x-1", 2)]  # topology and rows


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case)))
def step(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> StepProgram:
    """Return the step of that many rows of a launch with the published flags."""
    topology, rows = request.param
    head = tmp_path_factory.mktemp("eagle3")
    (head / "config.json").write_text(json.dumps(HEAD))
    args = ServerArgs(
        model_path="Qwen3-8B",
        attention_backend="fa",
        page_size=64,
        mem_fraction_static=0.8,
        speculative_algorithm="EAGLE3",
        speculative_draft_model_path=str(head),
        speculative_eagle_topk=1,
        speculative_num_steps=W - 1,
        speculative_num_draft_tokens=W,
    )
    plan, made, placement = programs.programs_of(args, topology)
    bucket = Bucket(rows * W, rows, W)
    return programs.compiled(plan, bucket, made[step_name(bucket)], placement)


@pytest.mark.supports("TPU, compiled only", CASES)
def test_the_heads_layer_is_the_last_of_the_one_pool(step: StepProgram) -> None:
    runner = step.plan.launch.runner_config
    assert [pool.num_layers for pool in runner.pools] == [step.num_layers + 1]
    assert runner.page_size == 64


def test_pool_and_state_change_in_place(step: StepProgram) -> None:
    assert [output for output, _ in step.module.aliased] == list(range(step.donated_leaves()))
    assert step.aliased_bytes >= step.pool_bytes
    assert programs.pool_copies(step) == []


def test_what_a_step_needs_besides_is_small(step: StepProgram) -> None:
    assert step.temp_bytes < 0.01 * step.pool_bytes


def test_the_plan_knows_what_the_program_is_given(step: StepProgram) -> None:
    assert step.argument_bytes == pytest.approx(programs.planned_bytes(step)[0], rel=programs.AGREEMENT)


def test_a_pass_of_the_head_has_no_product_that_nothing_needs(step: StepProgram) -> None:
    """Over the step's tokens the head's layer only writes its KV, beside the target's layers and logits. The later passes, in a
    loop, have the whole layer and the draft's logits."""
    devices, layers = step.plan.target.num_devices, step.num_layers
    layer = qkv, *_ = [(N + 2 * K) * H // devices, D, 2 * F // devices, D]  # and o, gate_up, down
    fc, logits, draft_logits = D, step.plan.model.config.vocab_size // devices, V // devices
    assert product_widths(step) == {
        False: Counter([*layer * layers, logits, fc, qkv]),
        True: Counter([*layer, draft_logits]),
    }


def test_nothing_as_large_as_a_matrix_is_made_in_the_loop(step: StepProgram) -> None:
    looped = [each for each in step.module.instructions() if each.in_loop and not each.in_branch]
    made = [array.size for each in looped for array in each.arrays if array.size not in step.pool_sizes]
    assert programs.weight_moves(step) == []
    assert 0 < max(made) < D * D


def product_widths(step: StepProgram) -> dict[bool, Counter[int]]:
    """Count the products with weights by the width of their output, outside of loops and in them."""
    found: dict[bool, Counter[int]] = {False: Counter(), True: Counter()}
    for each in step.module.instructions():
        for inner in programs.fused(step.module, each) if not each.in_branch else ():
            if inner.opcode in programs.PRODUCTS and "oi,ti->ot" in inner.op_name:
                found[each.in_loop][inner.arrays[0].shape[-1]] += 1
    return found
