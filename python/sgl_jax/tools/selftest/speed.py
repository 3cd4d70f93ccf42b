"""Measured rates of the devices, and how near a decode step of a real model's shape comes to that."""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from sgl_jax.engine.startup import build_core
from sgl_jax.models.bundled import bundled
from sgl_jax.models.families import decoder_config
from sgl_jax.models.weights import declare
from sgl_jax.planning.machine_rates import Rates, measure_rates
from sgl_jax.planning.topology import Chip, chip_of
from sgl_jax.runtime.memory import device_memory
from sgl_jax.runtime.platform import Platform
from sgl_jax.settings.server_args import ServerArgs
from sgl_jax.tools.benchmark.batch_arguments import Case
from sgl_jax.tools.benchmark.one_batch import DeviceBatch, time_batch


@dataclasses.dataclass(frozen=True)
class Shape:
    """A step to time: a bundled model with random weights, and its batch."""

    model: str
    num_layers: int | None  # None: all
    case: Case
    step_tokens: int


# A CPU gets what it does in seconds. Weights and KV of the large one take 24 GB over all devices.
ON_CPU = Shape("Qwen3-0.6B", 2, Case(8, 64, 12), 8)
SMALL = Shape("Qwen3-0.6B", None, Case(64, 1024, 34), 1024)
LARGE = Shape("Qwen3-8B", None, Case(64, 1024, 34), 1024)
LARGE_BYTES = 30e9


@dataclasses.dataclass(frozen=True)
class DeviceRates:
    """Rates of all devices together."""

    measured: Rates
    chip: Chip | None  # the maker's figures of one device; None: not in planning/topology.py
    num_devices: int
    dtype: str


@dataclasses.dataclass(frozen=True)
class StepTime:
    shape: Shape
    tp_size: int
    seconds: float  # the median decode step, its tokens on the host
    step_bytes: float  # of weights and KV that it must read

    def bound(self, bytes_per_s: float) -> float:
        return self.step_bytes / bytes_per_s


def device_rates(platform: Platform, devices: Sequence[jax.Device]) -> DeviceRates:
    """Raises NotMeasured."""
    measured = measure_rates(devices, platform.dtype)
    return DeviceRates(measured, chip_of(devices[0].device_kind), len(devices), platform.dtype)


def shape_for(platform: Platform, devices: Sequence[jax.Device]) -> Shape:
    if platform.name == "cpu":
        return ON_CPU
    return LARGE if device_memory(devices[0]) * len(devices) >= LARGE_BYTES else SMALL


def step_time(platform: Platform, tp_size: int, shape: Shape) -> StepTime:
    """Starts an engine on the devices, random weights and all, and times its decode steps. Raises what that raises."""
    config = json.loads(bundled()[shape.model])
    if shape.num_layers is not None:
        config["num_hidden_layers"] = shape.num_layers
    tokens = shape.case.input_len + shape.case.output_len
    page = 128  # no platform and no kernel takes larger ones by itself
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        core = build_core(
            ServerArgs(
                model_path=folder,
                load_format="dummy",
                device=platform.name,
                tp_size=tp_size,
                max_running_requests=shape.case.batch_size,
                chunked_prefill_size=shape.step_tokens,
                context_length=2 * tokens,
                max_total_tokens=(shape.case.batch_size + 2) * -(-tokens // page) * page,
                random_seed=0,
            )
        )
        rng = np.random.default_rng(0)
        prompts = rng.integers(0, core.info.vocab_size, (shape.case.batch_size, shape.case.input_len)).tolist()
        batch = DeviceBatch(core.runner, core.info, prompts, shape.case.output_len)
        times = time_batch(batch, shape.case, time.perf_counter)
    context = shape.case.input_len + shape.case.output_len / 2
    weights = core.info.weight_bytes
    if not config.get("tie_word_embeddings"):  # of the embedding a step reads a line per row, as good as nothing
        weights -= declare(decoder_config(config), core.info.dtype).embed.nbytes
    step_bytes = weights + shape.case.batch_size * context * core.info.kv_bytes_per_token
    assert times.median_decode_s is not None  # the case has decode steps
    return StepTime(shape, tp_size, times.median_decode_s, step_bytes)
