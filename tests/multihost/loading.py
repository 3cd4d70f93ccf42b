"""`python loading.py FOLDER RANK PORT`: one of two processes with two devices each loads a model over all four; prints
the bytes that it copied out of the files."""

from __future__ import annotations

import sys
import threading

import jax

from sgl_jax.models import loader
from sgl_jax.models.checkpoint import open_checkpoint
from sgl_jax.models.families import decoder_config
from sgl_jax.models.shard import as_slice
from sgl_jax.parallel.grid import Grid
from sgl_jax.parallel.placement import Placement
from sgl_jax.parallel.processes import join_processes
from sgl_jax.runtime.placed_weights import DevicePlacer
from sgl_jax.runtime.platform import pick_devices

if __name__ == "__main__":
    folder, rank, port = sys.argv[1:]
    address = f"127.0.0.1:{port}"
    join_processes(address, address, 2, int(rank), 120)
    grid = Grid(4, 1, 1, False)
    _, devices = pick_devices("cpu", grid.num_devices)
    assert [device.process_index for device in devices] == [0, 0, 1, 1]

    copied, lock, blocks = [0], threading.Lock(), loader._blocks

    def counting(leaf, shard):
        for block in blocks(leaf, shard):
            with lock:
                copied[0] += (block if shard.columns is None else block[:, as_slice(shard.columns)]).nbytes
            yield block

    loader._blocks = counting
    checkpoint = open_checkpoint(folder)
    model = decoder_config(checkpoint.config, checkpoint.generation_config, checkpoint.tensors)
    weights = loader.load_weights(checkpoint, model, "float32", placer=DevicePlacer(Placement.over(devices, grid)))
    held = sum(shard.data.nbytes for leaf in jax.tree.leaves(weights) for shard in leaf.addressable_shards)
    print(f"{copied[0]} {held}", flush=True)
