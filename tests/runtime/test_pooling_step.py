"""Programs of a launch that makes vectors: states of rows in place of logits and samples."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import pytest

from sgl_jax.models.decoder_config import DecoderConfig
from sgl_jax.models.families import decoder_config
from sgl_jax.parallel.placement import Placement
from sgl_jax.runtime.buckets import Bucket
from sgl_jax.runtime.compiler import Program
from sgl_jax.runtime.device_state import initial_state
from sgl_jax.runtime.placed_weights import abstract_weights
from sgl_jax.runtime.platform import PLATFORMS, kernels_for
from sgl_jax.runtime.pool import pools_of
from sgl_jax.runtime.pooling_step import PooledOutputs
from sgl_jax.runtime.programs import RunnerConfig, make_programs
from sgl_jax.runtime.step import StepOutputs

TOKENS, ROWS = 8, 2


def config_of(model: DecoderConfig, **options: bool) -> RunnerConfig:
    pools = pools_of(model, kernels_for(None, PLATFORMS["cpu"], model).attention, "float32")
    return RunnerConfig("float32", "float32", pools, 16, 9, ROWS, 64, (Bucket(TOKENS, ROWS),), **options)


def programs(model: DecoderConfig) -> list[Program]:
    placement = Placement.over(jax.devices("cpu")[:1])
    weights, kernels = (
        abstract_weights(model, np.float32, placement, stacked=False),
        kernels_for(None, PLATFORMS["cpu"], model),
    )
    return make_programs(model, config_of(model), kernels, placement, weights)


def outputs(program: Program) -> StepOutputs | PooledOutputs:
    return jax.eval_shape(program.function, *program.args)[-1]


@pytest.fixture
def model(stories260k: Path) -> DecoderConfig:
    return decoder_config(json.loads((stories260k / "config.json").read_text()))


@pytest.mark.parametrize("method", ["last", "mean"])
def test_a_pooling_step_gives_a_state_for_each_row_and_multiplies_no_vocabulary(
    model: DecoderConfig, method: Literal["last", "mean"]
) -> None:
    step, *loads = programs(dataclasses.replace(model, pooling=method))
    assert [each.name for each in loads] == ["load pages"]
    (found,) = outputs(step)
    assert (found.shape, found.dtype) == ((ROWS, model.hidden_size), np.float32)
    text = step.function.lower(*step.args).as_text()
    wide = f"x{model.vocab_size}xf32>"
    assert wide not in text
    assert wide in programs(model)[0].function.lower(*programs(model)[0].args).as_text()


def test_a_generating_step_gives_what_it_gave(model: DecoderConfig) -> None:
    step, *loads = programs(model)
    assert [each.name for each in loads] == ["load pages", "load counts", "load bias"]
    found = outputs(step)
    assert isinstance(found, StepOutputs)
    assert found._fields == ("tokens", "counts", "logprobs", "prompt_logprobs")
    assert [each.shape for each in jax.tree.leaves(found)][:2] == [(ROWS, 1), (ROWS, 2)]


def test_arrays_that_nobody_reads_have_a_column_for_each_device(model: DecoderConfig) -> None:
    """Columns of tokens are divided over the devices, and the compiler takes no empty shard."""
    for pooling, masks in (("last", False), (None, False), (None, True)):
        config = config_of(model, takes_grammars=masks)
        sizes = config.state_sizes(dataclasses.replace(model, pooling=pooling), 4)
        state = jax.eval_shape(lambda sizes=sizes: initial_state(sizes))
        assert state.token_counts.shape[1] == (4 if pooling else model.vocab_size)
        assert state.grammar_mask.shape[1] == (model.vocab_size if masks else 4)
