"""Tests of the sampler on devices that each hold a shard of the vocabulary: tokens equal those of one device."""

from __future__ import annotations

import dataclasses
import functools
import os
import subprocess
import sys

import jax
import numpy as np
import test_sampler as one_device
from jax.sharding import Mesh, PartitionSpec

from quick_compiles import XLA_FLAG
from sgl_jax.parallel.grid import MeshAxis
from sgl_jax.runtime import sampler

DEVICES, VOCAB = 4, 1000


def test_shards_and_blocks_change_no_token() -> None:
    """Run in a process of its own, with several CPU devices."""
    environ = os.environ | {
        "XLA_FLAGS": f"{XLA_FLAG} --xla_force_host_platform_device_count={DEVICES}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    done = subprocess.run(
        [sys.executable, __file__], env=environ, capture_output=True, text=True, timeout=280, check=False
    )
    assert (done.returncode, done.stdout) == (0, "the same\n"), done.stderr[-3000:]


def main() -> None:
    rows = [dataclasses.replace(row, seed=i) for i, row in enumerate(one_device.mixed_rows() * 2)][:21]
    logits = np.random.default_rng(3).normal(0, 3, (len(rows), VOCAB)).astype(np.float32)
    lines, state = one_device.step_of(rows, VOCAB, len(rows))
    wanted = np.asarray(jax.jit(sampler.sample)(logits, lines, state))
    axis, whole, shards = MeshAxis(("tensor",), DEVICES), PartitionSpec(), PartitionSpec(None, "tensor")
    mesh = Mesh(np.array(jax.devices()), axis.names)
    places = dataclasses.replace(jax.tree.map(lambda _: whole, state), token_counts=shards, grammar_mask=shards)
    sampler._LINES_BYTES = 8 * 4 * (VOCAB // DEVICES)
    assert sampler.lines_at_once(VOCAB // DEVICES) == 8
    function = functools.partial(sampler.sample, axis=axis)
    sharded = jax.shard_map(function, mesh=mesh, in_specs=(shards, whole, places), out_specs=whole, check_vma=False)
    np.testing.assert_array_equal(jax.jit(sharded)(logits, lines, state), wanted)
    print("the same")


if __name__ == "__main__":
    main()
