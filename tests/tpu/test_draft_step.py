"""Wide steps that end with a draft model, as a TPU would run them: its layers work in the target's pool, and its passes cost no
more than their products."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from pathlib import Path

import pytest
import tpu_programs as programs
from tpu_programs import StepProgram

from sgl_jax.models.bundled import bundled_config
from sgl_jax.planning.hlo import Instruction
from sgl_jax.planning.model import find_model
from sgl_jax.runtime.buckets import Bucket
from sgl_jax.runtime.programs import step_name
from sgl_jax.settings.server_args import ServerArgs

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"),
    pytest.mark.timeout(1200),
]

W, DRAFT_VOCABULARY = 4, 32000


# Launches with the published flags, the rows of the step, and the layers of the target; a whole one has more of the same.
CASES = [
    ("Qwen3-8B", "v6e-1", "EAGLE3", 8, 8),
    ("Qwen3-8B", "v7x-1", "EAGLE3", 4, 8),
    ("Llama-3.1-8B", "v6e-4", "EAGLE3", 8, 8),
    ("Qwen3-32B", "v6e-4", "EAGLE3", 8, 8),
    ("GLM-4.5-Air", "v6e-1", "NEXTN", 8, 3),
    ("Qwen3-8B", "v6e-1", "STANDALONE", 8, 6),
]
Case = tuple[str, str, str, int, int]


def write_config(folder: Path, name: str, num_layers: int) -> str:
    """Write the config.json of a model with so many layers; return its path."""
    folder.mkdir()
    config = dict(bundled_config(name)) | {"num_hidden_layers": num_layers}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def write_head(folder: Path, name: str) -> str:
    """Write the config.json of a head for the model, in AngelSlim's layout."""
    target = find_model(ServerArgs(model_path=name)).config
    config = {
        "architectures": ["Eagle3LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": target.hidden_size,
        "num_hidden_layers": 1,
        "num_attention_heads": target.num_heads,
        "num_key_value_heads": target.num_kv_heads,
        "head_dim": target.head_dim,
        "intermediate_size": target.intermediate_size,
        "vocab_size": target.vocab_size,
        "draft_vocab_size": DRAFT_VOCABULARY,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def name_of(case: Case) -> str:
    return "-".join(map(str, case[:4]))


@pytest.fixture(scope="module", params=CASES, ids=name_of)
def step(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> StepProgram:
    model, topology, algorithm, rows, num_layers = request.param
    folder, draft = tmp_path_factory.mktemp("launch"), None
    if algorithm == "EAGLE3":
        draft = write_head(folder / "draft", model)
    if algorithm == "STANDALONE":
        draft = write_config(folder / "draft", "Qwen3-0.6B", 2)
    args = ServerArgs(
        model_path=write_config(folder / "target", model, num_layers),
        attention_backend="fa",
        page_size=64,
        mem_fraction_static=0.8,
        speculative_algorithm=algorithm,
        speculative_draft_model_path=draft,
        speculative_eagle_topk=1,
        speculative_num_steps=W - 1,
        speculative_num_draft_tokens=W,
    )
    plan, made, placement = programs.programs_of(args, topology)
    bucket = Bucket(rows * W, rows, W)
    return programs.compiled(plan, bucket, made[step_name(bucket)], placement)


of_heads = pytest.mark.parametrize("step", [case for case in CASES if case[2] == "EAGLE3"], ids=name_of, indirect=True)


@pytest.mark.supports("TPU, compiled only", CASES)
def test_the_draft_models_layers_are_the_last_of_the_one_pool(step: StepProgram) -> None:
    runner, draft = step.plan.launch.runner_config, step.plan.model.config.draft
    assert draft is not None
    assert [pool.num_layers for pool in runner.pools] == [step.num_layers + draft.decoder.num_layers]
    assert runner.page_size == 64


def test_pool_and_state_change_in_place(step: StepProgram) -> None:
    assert [output for output, _ in step.module.aliased] == list(range(step.donated_leaves()))
    assert step.aliased_bytes >= step.pool_bytes
    assert programs.pool_copies(step) == []


def test_what_a_step_needs_besides_is_small(step: StepProgram) -> None:
    assert step.temp_bytes < 0.01 * step.pool_bytes


def test_the_plan_knows_what_the_program_is_given(step: StepProgram) -> None:
    assert step.argument_bytes == pytest.approx(programs.planned_bytes(step)[0], rel=programs.AGREEMENT)


def test_logits_of_target_and_draft_stay_where_they_are(step: StepProgram) -> None:
    assert programs.largest_gathered_axis(step) < DRAFT_VOCABULARY // step.plan.target.num_devices // 16


@of_heads
def test_a_pass_of_the_head_has_no_product_that_nothing_needs(step: StepProgram) -> None:
    """Over the step's tokens the head's layer only writes its KV, beside the target's layers and logits. The later passes, in a
    loop, have the whole layer and the draft's logits."""
    devices, target = step.plan.target.num_devices, step.plan.model.config
    d, head_dim, groups = target.hidden_size, target.head_dim, target.num_heads + 2 * target.num_kv_heads
    layer = qkv, *_ = [groups * head_dim // devices, d, 2 * target.intermediate_size // devices, d]
    fc, logits, draft_logits = d, target.vocab_size // devices, DRAFT_VOCABULARY // devices
    assert product_widths(step) == {
        False: Counter([*layer * step.num_layers, logits, fc, qkv]),  # qkv, o, gate_up and down of a layer
        True: Counter([*layer, draft_logits]),
    }


@of_heads
def test_nothing_as_large_as_a_matrix_is_made_in_the_loop(step: StepProgram) -> None:
    looped = [each for each in step.module.instructions() if each.in_loop and not each.in_branch]
    made = [each for each in looped if not is_prefetch(each)]
    sizes = [array.size for each in made for array in each.arrays if array.size not in step.pool_sizes]
    assert programs.weight_moves(step) == []
    assert 0 < max(sizes) < step.plan.model.config.hidden_size**2 // step.plan.target.num_devices


def is_prefetch(each: Instruction) -> bool:
    """Whether it takes something into the chip's own memory ahead, as a whole or in slices that are put together."""
    slices = [name.startswith("slice-done") for name in each.operands]
    return each.opcode.endswith(("-start", "-done")) or (bool(slices) and all(slices))


def product_widths(step: StepProgram) -> dict[bool, Counter[int]]:
    """Count the products with weights by the width of their output, outside of loops and in them."""
    found: dict[bool, Counter[int]] = {False: Counter(), True: Counter()}
    for each in step.module.instructions():
        for inner in step.module.fused(each) if not each.in_branch else ():
            if step.module.multiplies(inner) and "oi,ti->ot" in inner.op_name:
                found[each.in_loop][inner.arrays[0].shape[-1]] += 1
    return found
