"""Native attention on TPU reads and writes the pool where it lies, for every page size, a power of two up to 1024."""

from __future__ import annotations

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sgl_jax.ops.attention import native
from sgl_jax.ops.attention.api import make_ragged_batch
from sgl_jax.runtime import topology

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")

TOKENS, ROWS, POOL_TOKENS = 128, 32, 1 << 19


# A page as long as a head is wide is what XLA once copied the pool for.
@pytest.mark.parametrize(
    ("page", "heads", "planes"),
    [(1, 2, 2), (2, 2, 2), (4, 2, 2), (128, 8, 2), (128, 1, 1), (1024, 8, 2)],
)
def test_the_pool_is_not_copied(page: int, heads: int, planes: int) -> None:
    topology.set_tpu_environment()
    mesh = Mesh(np.array(topology.tpu_devices(topology.parse("v6e-1"))[:1]), ("x",))

    def array(shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    def layer(q, k, v, kv, table, start, num_new, num_short, first_page):
        batch = make_ragged_batch(table, start, num_new, num_short, TOKENS, page)
        attend = functools.partial(native.paged_attention, vectorise=True, first_page=first_page, scale=0.1)
        return attend(q, k, v, kv, batch, value_dim=None if planes == 2 else 64)

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
