"""Native attention on TPU reads and writes the pool where it lies, for every page size, a power of two up to 1024."""

from __future__ import annotations

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sgl_jax.ops.attention import native
from sgl_jax.ops.attention.api import AttentionLayer, AttentionSpec, make_ragged_batch
from sgl_jax.planning import topology

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")

TOKENS, ROWS, POOL_TOKENS = 128, 32, 1 << 19


# XLA once copied the pool where page_size equals head_dim.
@pytest.mark.parametrize(
    ("page", "heads", "planes", "width"),
    [
        (1, 2, 2, 1),
        (2, 2, 2, 1),
        (4, 2, 2, 1),
        (128, 8, 2, 1),
        (128, 8, 2, 4),
        (128, 1, 1, 1),
        (128, 1, 1, 4),
        (1024, 8, 2, 1),
    ],
)
def test_the_pool_is_not_copied(page: int, heads: int, planes: int, width: int) -> None:
    topology.set_tpu_environment()
    mesh = Mesh(np.array(topology.tpu_devices(topology.parse("v6e-1"))[:1]), ("x",))

    def array(shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    def layer(q, k, v, kv, table, start, num_new, num_short, first_page):
        batch = make_ragged_batch(table, start, num_new, num_short, TOKENS, page)
        spec = AttentionSpec(0.1, value_dim=None if planes == 2 else 64, width=width)
        return native.paged_attention(q, k, v, kv, batch, AttentionLayer(spec, first_page), vectorise=True)

    new = array((TOKENS, heads, 128), jnp.bfloat16)
    kv = array((POOL_TOKENS // page, heads, planes, page, 128), jnp.bfloat16)
    rows = array((ROWS,))
    table = array((ROWS, max(1, 4096 // page)))
    args = (
        array((TOKENS, 4 * heads, 128), jnp.bfloat16),
        new,
        new if planes == 2 else None,
        kv,
        table,
        rows,
        rows,
        array(()),
        array(()),
    )
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = jax.jit(layer, donate_argnums=3).trace(*args).lower(lowering_platforms=("tpu",)).compile()
    memory, pool_bytes = compiled.memory_analysis(), kv.size * kv.dtype.itemsize
    assert memory.alias_size_in_bytes == pool_bytes
    assert memory.temp_size_in_bytes < 0.02 * pool_bytes
