"""Products with weights: their numbers and names; every declared matrix has one."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sgl_jax.models import linear as products
from sgl_jax.models.families import decoder_config
from sgl_jax.models.linear import grouped_linear, linear
from sgl_jax.models.spec import SITES
from sgl_jax.models.weights import declare, head, site_of
from sgl_jax.ops.grouped_matmul import native, reference
from sgl_jax.ops.quantized_matmul.native import quantized_grouped_matmul
from sgl_jax.parallel.placement import Placement
from sgl_jax.runtime.buckets import Bucket
from sgl_jax.runtime.placed_weights import abstract_weights
from sgl_jax.runtime.platform import PLATFORMS, kernels_for
from sgl_jax.runtime.pool import pools_of
from sgl_jax.runtime.programs import RunnerConfig, make_programs

RNG = np.random.default_rng(0)
X = RNG.standard_normal((3, 8)).astype(np.float32)
W = RNG.standard_normal((5, 8)).astype(np.float32)
BIAS = RNG.standard_normal(5).astype(np.float32)
QUANTISED = functools.partial(quantized_grouped_matmul, grouped_matmul=native.grouped_matmul)


def test_each_token_is_multiplied_with_the_matrix() -> None:
    np.testing.assert_allclose(linear(jnp.asarray(X), jnp.asarray(W), site="o"), X @ W.T, rtol=1e-5)
    biased = linear(jnp.asarray(X), jnp.asarray(W), jnp.asarray(BIAS), site="qkv")
    np.testing.assert_allclose(biased, X @ W.T + BIAS, rtol=1e-5)


def test_the_result_has_the_activations_dtype_or_the_one_asked_for() -> None:
    x, w = jnp.asarray(X, jnp.bfloat16), jnp.asarray(W, jnp.bfloat16)
    bias = jnp.asarray(BIAS)
    assert linear(x, w, bias, site="o").dtype == jnp.bfloat16
    wide = linear(x, w, bias, site="moe.router", out_dtype=jnp.float32)
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T + BIAS
    assert wide.dtype == jnp.float32
    np.testing.assert_allclose(wide, exact, rtol=1e-5)


def test_weights_of_another_dtype_are_multiplied_as_the_activations_are() -> None:
    narrow = jnp.asarray(W, jnp.bfloat16)
    wanted = X @ np.asarray(narrow, np.float32).T
    np.testing.assert_allclose(linear(jnp.asarray(X), narrow, site="o"), wanted, rtol=1e-5)
    sizes = jnp.array([2, 0, 1], jnp.int32)
    experts = jnp.asarray(RNG.standard_normal((2, 3, 5, 8)), jnp.bfloat16)
    out = grouped_linear(jnp.asarray(X), experts, 1, sizes, native.grouped_matmul, QUANTISED, site="moe.experts.down")
    np.testing.assert_allclose(out, reference.grouped_matmul(X, experts, 1, sizes), rtol=1e-5)


def test_a_matrix_that_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match=r"mla\.q_up.* \[5, 8\].* 7 "):
        linear(jnp.asarray(X[:, :7]), jnp.asarray(W), site="mla.q_up")
    with pytest.raises(ValueError, match="gate_up"):
        linear(jnp.asarray(X), None, site="gate_up")


FAMILIES = ["stories260k", "qwen2_moe-mixed", "deepseek_v2", "deepseek_v2-lite", "gpt_oss"]


@pytest.mark.parametrize("folder", FAMILIES)
def test_every_declared_matrix_is_multiplied_at_its_site(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    model = decoder_config(json.loads((checkpoint(folder) / "config.json").read_text()))
    seen = set()

    def fitting(w: jax.Array, x: jax.Array, site: str) -> jax.Array:
        seen.add((site, w.shape[-3:] if site.startswith("moe.experts") else w.shape))
        return w

    monkeypatch.setattr(products, "_fitting", fitting)
    placement = Placement.over(jax.devices("cpu")[:1])
    kernels = kernels_for(None, PLATFORMS["cpu"], model)
    pools = pools_of(model, kernels.attention, "float32")
    config = RunnerConfig("float32", "float32", pools, 16, 9, 2, 64, (Bucket(8, 2),))
    weights = abstract_weights(model, "float32", placement, stacked=False)
    program = next(
        each for each in make_programs(model, config, kernels, placement, weights) if each.name.startswith("tokens=")
    )
    program.function.lower(*program.args)
    flat, _ = jax.tree_util.tree_flatten_with_path(declare(model, "float32"))
    declared = {(site, spec.shape) for path, spec in flat if (site := site_of(path))}
    assert seen == declared | {("lm_head", head(declare(model, "float32")).shape)}


def test_all_matrices_but_three_have_a_site(checkpoint: Callable[[str], Path]) -> None:
    """The embedding is looked up; the up-projections of latent attention are multiplied head by head."""
    plain = set()
    for folder in FAMILIES:
        config = decoder_config(json.loads((checkpoint(folder) / "config.json").read_text()))
        flat, _ = jax.tree_util.tree_flatten_with_path(declare(config, "float32"))
        plain |= {
            jax.tree_util.keystr(path).rpartition(".")[2] for path, spec in flat if spec.is_matrix and not site_of(path)
        }
    assert plain == {"embed", "k_up", "v_up"}
    assert len(SITES) == 16
