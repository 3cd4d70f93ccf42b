"""Steps that make vectors as a TPU would run them: the pool changes in place, no weight is copied, and there is no head."""

from __future__ import annotations

import dataclasses
import importlib.util

import pytest
import tpu_programs as programs

from sgl_jax.planning.model import find_model
from sgl_jax.runtime.programs import step_name
from sgl_jax.settings.server_args import ServerArgs

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"),
    pytest.mark.timeout(600),
]
LAYERS, VOCABULARY, TOKENS = 2, 16384, 2048


@pytest.mark.parametrize("topology", ["v6e-4", "v7x-1"])
def test_a_step_makes_vectors_without_a_head(topology: str) -> None:
    found = []
    for task in ("generate", "embed"):
        args = ServerArgs(model_path="Qwen3-8B", attention_backend="fa", task=task)
        model = find_model(args)
        config = dataclasses.replace(model.config, num_layers=LAYERS, vocab_size=VOCABULARY)
        plan, made, placement = programs.programs_for(args, dataclasses.replace(model, config=config), topology)
        bucket = next(each.bucket for each in plan.steps if each.bucket.num_tokens == TOKENS)
        found.append(programs.compiled(plan, bucket, made[step_name(bucket)], placement))
    generates, pools = found
    assert pools.aliased_bytes >= pools.pool_bytes > 0
    assert programs.weight_moves(pools) == []
    assert generates.args[0].lm_head is not None
    assert pools.args[0].lm_head is None
    sums = [[each for each in one.module.collectives() if not each.in_branch] for one in found]
    assert len(sums[1]) <= len(sums[0])
