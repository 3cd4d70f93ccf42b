"""`python grid_updates.py FOLDER OTHER GRID…`: checks that engines on each grid of 8 virtual CPU devices take the weights of
another folder, and give memory back. Grids are those of grid_engine.py. One JSON line for each says what was compiled."""

from __future__ import annotations

import dataclasses
import gc
import json
import sys
import time
from typing import Any

import jax
from grid_engine import STORIES, flags, quantised_config, speculation

import sgl_jax
from sgl_jax.engine import weight_files
from sgl_jax.models.families import decoder_config
from sgl_jax.runtime import platform

PROMPTS = [[*range(3, 3 + n)] for n in (1, 5, 20, 33)]
PARAMS = {"temperature": 0, "max_new_tokens": 16, "ignore_eos": True}


def start(folder: str, grid: str) -> sgl_jax.Engine:
    sizes = flags(grid)
    return sgl_jax.Engine(
        model_path=folder,
        dtype="float32",
        page_size=4,
        max_running_requests=8,
        chunked_prefill_size=16,
        max_total_tokens=256 * sizes.get("dp_size", 1),
        tokenizer_path=STORIES,
        **sizes,
        **speculation(folder, grid),
    )


def answers(engine: sgl_jax.Engine) -> list[list[int]]:
    found: Any = engine.generate(input_ids=PROMPTS, sampling_params=PARAMS)
    return [each["output_ids"] for each in found]


def array_bytes(engine: sgl_jax.Engine) -> int:
    for _ in range(2):  # the last step is over when this is answered
        engine.flush_cache()
    while engine.stats.num_compiling:  # which makes arrays for a while
        time.sleep(0.05)
    gc.collect()
    return sum(each.nbytes for each in jax.live_arrays())


def check(folder: str, other: str, grid: str) -> int:
    with start(other, grid) as engine:
        new = answers(engine)
    del engine
    with start(folder, grid) as engine:
        old, whole = answers(engine), array_bytes(engine)
        assert old != new
        engine.update_weights_from_disk(other)
        assert (answers(engine), array_bytes(engine)) == (new, whole)
        engine.update_weights_from_disk(folder)
        engine.release_memory_occupation()
        assert array_bytes(engine) < whole
        engine.resume_memory_occupation()
        assert (answers(engine), array_bytes(engine)) == (old, whole)
        engine.release_memory_occupation(["weights"])
        engine.update_weights_from_disk(other)
        engine.resume_memory_occupation()
        assert (answers(engine), array_bytes(engine)) == (new, whole)
        return engine.stats.compiles_after_ready


if __name__ == "__main__":
    for grid in sys.argv[3:]:
        words = grid.split("-")
        cpu = dataclasses.replace(
            platform.PLATFORMS["cpu"], stacks_layers="scan" in words, vectorises_rows="scan" in words
        )
        platform.PLATFORMS["cpu"] = cpu
        weight_files.decoder_config = quantised_config if "int8" in words else decoder_config
        print(json.dumps({grid: check(*sys.argv[1:3], grid)}), flush=True)
