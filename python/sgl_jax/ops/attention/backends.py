"""The implementations of the attention contract by name: ours, and those that installed packages bring.

A package brings one by an entry point in the group `sgl_jax.attention` that names a `Backend`
(docs/features/attention_backend.md).
"""

import dataclasses
import functools
from collections.abc import Callable
from importlib import metadata

import jax.numpy as jnp
from jax.typing import DTypeLike

from sgl_jax.ops.attention import cpu, native
from sgl_jax.ops.attention.api import AnyPool, Attention, AttentionLayer, NewKV, Output, Queries, RaggedBatch
from sgl_jax.ops.cpu.library import find_library

GROUP = "sgl_jax.attention"
_FA_PAGE = 128  # takes half the instructions of pages of 16 (docs/decisions/0015-pages-of-128-on-tpu.md)


class NoSuchBackend(ValueError):
    """No backend has the name, or it does not run on the platform."""


@dataclasses.dataclass(frozen=True)
class PoolOrder:
    """The order of a pool in memory, for a backend that wants another than the contract's `[LP, K, planes, page, H]`."""

    page: Callable[[int, int, int, int, DTypeLike], tuple[int, ...]]  # (K, planes, page, H, dtype): the shape of a page
    axes: tuple[str | None, ...]  # axes of the pool: "pages" first, and "kv_heads" where tensor parallelism divides it


HEADS_FIRST = PoolOrder(
    page=lambda heads, planes, page_size, width, dtype: (heads, planes, page_size, width),
    axes=("pages", "kv_heads", None, None, None),
)


@dataclasses.dataclass(frozen=True)
class Backend:
    """An implementation of the contract, and what it needs of the pool."""

    attend: Attention
    platforms: frozenset[str] = frozenset({"cpu", "gpu", "tpu"})
    pool_head_dim: Callable[[int], int] = lambda head_dim: head_dim  # H of the pool, for heads of that size
    page_multiple: Callable[[DTypeLike], int] = lambda dtype: 1  # divides page sizes, for a pool of the dtype
    latent: bool = False  # it takes pools of one plane (AttentionSpec.value_dim)
    fused: bool = False  # it takes q, k and v fused, k and v None (api.py)
    page_size: int | None = None  # the default for launches that name none; None: the platform's
    pool_order: PoolOrder = HEADS_FIRST
    make_pool: Callable[[tuple[int, ...], str], AnyPool] = jnp.zeros  # makes the pool of one device, zeros

    def __call__(
        self, q: Queries, k: NewKV | None, v: NewKV | None, kv: AnyPool, batch: RaggedBatch, layer: AttentionLayer
    ) -> tuple[Output, AnyPool]:
        return self.attend(q, k, v, kv, batch, layer)


def find_backend(name: str, platform: str, *, vectorise: bool, latent: bool = False) -> Backend:
    """Return the backend of a name for "cpu", "gpu" or "tpu"; `vectorise`: native runs rows side by side; `latent`: the
    model keeps one vector per token. Raises NoSuchBackend, which lists the backends there are."""
    brought = {point.name: point for point in metadata.entry_points(group=GROUP)}
    if name == "native":
        backend = Backend(functools.partial(native.paged_attention, vectorise=vectorise), latent=True)
    elif name == "cpu":
        if (library := find_library()) is None:
            raise NoSuchBackend(
                "--attention-backend cpu: its library is not there; sgl_jax was installed where no C++ compiler is; use native"
            )
        attend = functools.partial(cpu.paged_attention, library=library)
        make_pool = functools.partial(cpu.make_pool, library=library)
        backend = Backend(attend, frozenset({"cpu"}), latent=True, make_pool=make_pool)
    elif name == "fa":
        from sgl_jax.ops.attention.fa import call, tile  # they import Pallas, which takes a while

        sizes = call.pool_head_dim, tile.row_tile
        platforms = frozenset({"tpu"})
        backend = Backend(call.paged_attention, platforms, *sizes, latent=True, fused=True, page_size=_FA_PAGE)
    elif name in brought:
        try:
            backend = brought[name].load()
        except ImportError as problem:
            raise NoSuchBackend(f"--attention-backend {name}: {problem}") from problem
        if not isinstance(backend, Backend):
            raise NoSuchBackend(f"--attention-backend {name}: {brought[name].value} is no sgl_jax Backend")
    else:
        known = ", ".join(["native", "cpu", "fa", *sorted(brought)])
        raise NoSuchBackend(f"--attention-backend {name}: there is no such backend; there are {known}")
    if platform not in backend.platforms:
        runs_on = " and ".join(sorted(backend.platforms))
        raise NoSuchBackend(f"--attention-backend {name}: it runs on {runs_on}, not on {platform}; use native")
    if latent and not backend.latent:
        raise NoSuchBackend(
            f"--attention-backend {name}: it cannot attend to the latent vectors of this model (MLA); leave the flag out"
        )
    return backend
