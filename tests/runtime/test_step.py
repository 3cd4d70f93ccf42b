"""Tests of the step program: its stages have the names that profiles show."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from profile_stages import DEVICE_STAGES

from sgl_jax.models.families import decoder_config
from sgl_jax.parallel.placement import Placement
from sgl_jax.runtime.buckets import Bucket
from sgl_jax.runtime.drafters import by_ngram
from sgl_jax.runtime.placed_weights import abstract_weights
from sgl_jax.runtime.platform import PLATFORMS, kernels_for
from sgl_jax.runtime.pool import pools_of
from sgl_jax.runtime.programs import RunnerConfig, make_programs

STAGES = set(DEVICE_STAGES)


@pytest.mark.parametrize("stacked", [False, True], ids=["list", "scan"])
def test_every_stage_is_in_the_names_of_the_program_s_operations(stories260k: Path, stacked: bool) -> None:
    model = decoder_config(json.loads((stories260k / "config.json").read_text()))
    placement = Placement.over(jax.devices("cpu")[:1])

    weights = abstract_weights(model, np.float32, placement, stacked=stacked)
    kernels = kernels_for(None, PLATFORMS["cpu"], model)
    pools, buckets = pools_of(model, kernels.attention, "float32"), (Bucket(8, 2, width=2),)
    config = RunnerConfig("float32", "float32", pools, 16, 9, 2, 64, buckets, width=2, keeps_tokens=True)
    drafter = functools.partial(by_ngram, min_ngram=1, max_ngram=2)
    programs = make_programs(model, config, kernels, placement, weights, drafter)
    program = next(each for each in programs if each.name.startswith("tokens="))
    text = program.function.lower(*program.args).as_text(debug_info=True)
    paths = {tuple(name.split("/")) for name in re.findall(r'loc\("([^"]+)"', text)}
    assert {part for path in paths for part in path} >= STAGES
    products = [path for path in paths if path[-1] == "dot_general"]
    assert products
    assert [path for path in products if not STAGES & set(path)] == []
