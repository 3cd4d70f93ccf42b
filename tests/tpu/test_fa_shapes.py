"""Every shape of heads and every option of the attention kernels compiles for the chips. Mosaic refuses layouts that
interpret mode accepts."""

from __future__ import annotations

import importlib.util
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sgl_jax.ops.attention.api import AttentionLayer, AttentionSpec, QKPrepare, make_ragged_batch
from sgl_jax.ops.attention.fa import call as fa
from sgl_jax.planning import topology

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")

TOKENS, ROWS, PAGES_PER_ROW = 64, 32, 40

# chip, (N, K, H), pool dtype, page size, options
CASES = [
    ("v6e", (9, 3, 64), "bfloat16", 16, ("window",)),
    ("v7x", (14, 2, 64), "bfloat16", 128, ("sinks", "prepare")),
    ("v6e", (8, 4, 256), "bfloat16", 64, ("window", "softcap")),
    ("v7x", (5, 5, 80), "bfloat16", 48, ("prepare",)),
    ("v6e", (4, 1, 96), "float32", 8, ("sinks",)),
    ("v7x", (4, 4, 192), "float8_e4m3fn", 32, ("window", "prepare")),
    ("v6e", (64, 8, 128), "int8", 32, ()),
    ("v6e", (8, 1, 128), "bfloat16", 128, ("softcap", "growth")),
    ("v6e", (32, 8, 128), "bfloat16", 128, ("fused", "prepare")),
    ("v7x", (8, 4, 256), "bfloat16", 128, ("fused", "window", "softcap")),
    ("v6e", (32, 8, 128), "bfloat16", 128, ("fused", "prepare", "first_key")),
    ("v6e", (128, 1, 576), "bfloat16", 16, ("latent",)),
    ("v7x", (32, 1, 576), "bfloat16", 128, ("latent", "window")),
    ("v7x", (16, 1, 576), "float8_e4m3fn", 32, ("latent",)),
]


@pytest.mark.parametrize(
    ("chip", "heads", "pool", "page", "options", "width"),
    [(*case, width) for case, width in zip(CASES, itertools.cycle([4, 1, 1, 4]))],
    ids=str,
)
def test_it_compiles_and_changes_the_pool_in_place(chip, heads, pool, page, options, width):
    topology.set_tpu_environment()
    num_heads, num_kv_heads, head_dim = heads
    mesh = Mesh(np.array(topology.tpu_devices(topology.parse(f"{chip}-1"))[:1]), ("x",))
    dtype = jnp.float32 if pool == "float32" else jnp.bfloat16

    def array(shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    def layer(q, k, v, kv, table, start, num_new, num_short, first_page, traced):
        batch = make_ragged_batch(table, start, num_new, num_short, TOKENS, page)
        static = {"softcap": 30.0} if "softcap" in options else {}
        if "growth" in options:
            static["temperature_length"] = 1024
        if "latent" in options:
            static["value_dim"] = 512
        if "first_key" in options:
            static["first_key"] = 1
        if "prepare" in options:
            traced = traced | {"prepare": QKPrepare(*traced["prepare"])}
        if "fused" in options:
            q, k, v = jnp.concatenate([q, k, v], axis=1), None, None
        spec = AttentionSpec(0.1, **static, width=width)
        return fa.paged_attention(q, k, v, kv, batch, AttentionLayer(spec, first_page, **traced))

    half = head_dim // 4  # a partial rotation
    norm = array((head_dim,), jnp.float32)
    traced = {
        "window": array(()),
        "kv_scales": array((2,), jnp.float32),
        "sinks": array((num_heads,), jnp.float32),
        "prepare": (norm, norm, array((TOKENS, 2 * half), jnp.float32)),
    }
    planes = 1 if "latent" in options else 2
    kv = array(
        ((262144 if "latent" in options else 16384) // page, num_kv_heads, planes, page, fa.pool_head_dim(head_dim)),
        pool,
    )
    new = array((TOKENS, num_kv_heads, head_dim), dtype)
    args = (
        array((TOKENS, num_heads, head_dim), dtype),
        new,
        None if "latent" in options else new,
        kv,
        array((ROWS, PAGES_PER_ROW)),
        array((ROWS,)),
        array((ROWS,)),
        array(()),
        array(()),
        {name: x for name, x in traced.items() if name in options or (name == "kv_scales" and kv.dtype.itemsize == 1)},
    )
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = jax.jit(layer, donate_argnums=3).trace(*args).lower(lowering_platforms=("tpu",)).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == kv.size * kv.dtype.itemsize
    assert memory.temp_size_in_bytes < 0.1 * kv.size * kv.dtype.itemsize
