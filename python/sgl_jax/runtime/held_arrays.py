"""Weights and KV pools that leave the devices and come back: for other weights, or to lend the memory to a trainer."""

import functools
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import cast

import jax
import numpy as np

from sgl_jax.models.weights import Weights
from sgl_jax.runtime.programs import KV, WEIGHTS
from sgl_jax.runtime.runner import ModelRunner

type Put = Callable[[], jax.Array]  # makes a weight on the devices from its copy in the host's memory
type ReadWeights = Callable[[str, str], list[Put]]  # from a path and a load format; in the order of the tree's leaves


class HeldArrays:
    """Exchanges a runner's weights, and releases and restores its arrays. No step may be in flight at any of it."""

    def __init__(self, runner: ModelRunner, read: ReadWeights):
        """`read` raises ValueError or OSError for weights that cannot take the place of the launch's."""
        self._runner, self._read = runner, read
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sgl-jax-weights")
        self._next: list[Put] = []  # weights that were read and are not in use yet
        self._kept: list[Put] = []  # released weights
        self._tree: jax.tree_util.PyTreeDef | None = None  # the released weights' tree
        self._released: set[str] = set()

    @property
    def released(self) -> frozenset[str]:
        """Tags whose arrays are not on the devices."""
        return frozenset(self._released)

    def read(self, path: str, load_format: str) -> Future[None]:
        """Begin to read weights into the host's memory. The result has the error of those that do not fit."""

        def work() -> None:
            self._next = self._read(path, load_format)

        return self._thread.submit(work)

    def exchange(self) -> None:
        """Put the weights that were read in the place of those in use, one array after the other."""
        puts, self._next = self._next, []
        if "weights" in self._released:
            self._kept = puts
            return
        leaves, tree = jax.tree.flatten(self._runner.take(WEIGHTS))
        puts.reverse()
        assert len(puts) == len(leaves)
        for i, leaf in enumerate(leaves):
            leaf.delete()
            leaves[i] = _like(leaf, puts.pop()())
        self._runner.give(WEIGHTS, jax.block_until_ready(jax.tree.unflatten(tree, leaves)))

    def release(self, tags: Iterable[str]) -> None:
        """Delete arrays on the devices. Of weights a copy stays in the host's memory, of KV nothing."""
        for tag in {*tags} - self._released:
            if tag == "weights":
                leaves, self._tree = jax.tree.flatten(self._runner.take(WEIGHTS))
                self._kept = [_saved(leaf) for leaf in leaves]
            else:
                for pool in jax.tree.leaves(self._runner.take(KV)):
                    pool.delete()
            self._released.add(tag)

    def resume(self, tags: Iterable[str]) -> None:
        """Put released arrays back: the same weights, or those that were read since, and empty pools."""
        for tag in {*tags} & self._released:
            if tag == "weights":
                assert self._tree is not None
                puts, self._kept = self._kept[::-1], []
                weights = jax.tree.unflatten(self._tree, [puts.pop()() for _ in range(len(puts))])
                self._runner.give(WEIGHTS, jax.block_until_ready(cast(Weights[jax.Array], weights)))
            else:
                self._runner.give(KV, self._runner.empty_pools())
            self._released.remove(tag)


def _saved(leaf: jax.Array) -> Put:
    """Copy a weight into the host's memory and delete it on the devices."""
    copy, sharding = np.asarray(leaf), leaf.sharding
    leaf.delete()
    return functools.partial(jax.device_put, copy, sharding)


def _like(old: jax.Array, new: jax.Array) -> jax.Array:
    """Return the new weight, which the programs take as they took the old one."""
    assert (new.shape, new.dtype, new.sharding) == (old.shape, old.dtype, old.sharding)
    return new
