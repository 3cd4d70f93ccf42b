"""Measured rates of the devices, and how near a decode step of a real model's shape comes to them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from sgl_jax.engine.core import Core
from sgl_jax.engine.startup import build_core
from sgl_jax.models.bundled import bundled
from sgl_jax.models.families import decoder_config
from sgl_jax.models.weights import declare
from sgl_jax.planning.machine_rates import Rates, measure_rates
from sgl_jax.planning.topology import Chip, chip_of
from sgl_jax.runtime.memory import device_memory
from sgl_jax.runtime.platform import Platform
from sgl_jax.settings.server_args import ServerArgs
from sgl_jax.tools.benchmark.arguments import Case
from sgl_jax.tools.benchmark.one_batch import ALONE, time_batch

_PAGE = 128  # the largest that a platform or kernel takes by itself


class Shape(NamedTuple):
    """A step to time: a bundled model with random weights, and its batch."""

    model: str
    num_layers: int | None  # None: all
    case: Case
    step_tokens: int


# A CPU gets a step of seconds. Weights and KV of the large one take 24 GB over all devices.
ON_CPU = Shape("Qwen3-0.6B", 2, Case(8, 64, 12), 16)
SMALL = Shape("Qwen3-0.6B", None, Case(64, 1024, 34), 1024)
LARGE = Shape("Qwen3-8B", None, Case(64, 1024, 34), 1024)
LARGE_BYTES = 30e9


class StepTime(NamedTuple):
    shape: Shape
    tp_size: int
    seconds: float  # the median decode step, its tokens on the host
    num_bytes: float  # weights and KV that it must read


def speed_lines(platform: Platform, devices: Sequence[jax.Device]) -> Iterator[str]:
    """Measure, and yield the report's lines. Raises NotMeasured, or whatever starting an engine raises."""
    rates, chip = device_rates(platform, devices), chip_of(devices[0].device_kind)
    yield from rate_lines(rates, chip, platform.dtype)
    # Heads divide over powers of two, and the models here have eight KV heads.
    tp_size = 1 << min(3, len(devices).bit_length() - 1) if platform.name != "cpu" else 1
    yield from step_lines(step_time(platform, tp_size, shape_for(platform, devices)), rates, chip)


def device_rates(platform: Platform, devices: Sequence[jax.Device]) -> Rates:
    """Return the rates of one device, with all working at once. Raises NotMeasured."""
    return Rates(*(rate / len(devices) for rate in measure_rates(devices, platform.dtype)))


def rate_lines(rates: Rates, chip: Chip | None, dtype: str) -> list[str]:
    """Describe the rates of one device, beside the maker's where its chip is known: on an issue people compare chips."""
    read, flops = rates.read_bytes_per_s, rates.matmul_flop_per_s
    of_read = f", {read / chip.bytes_per_s:.0%} of the maker's {chip.bytes_per_s / 1e9:.0f} GB/s" if chip else ""
    rated = chip.flops[dtype] if chip else 0.0
    of_flops = f", {flops / rated:.0%} of the maker's {rated / 1e12:.0f} TFLOP/s" if chip else ""
    return [
        f"  memory is read at {read / 1e9:.0f} GB/s a device{of_read}",
        f"  products in {dtype} at {flops / 1e12:.3g} TFLOP/s a device{of_flops}",
    ]


def step_lines(step: StepTime, rates: Rates, chip: Chip | None) -> list[str]:
    """Describe a step beside the time it takes to read its bytes, at the rates of one device."""
    case, layers = step.shape.case, step.shape.num_layers
    model = step.shape.model if layers is None else f"{step.shape.model}, {layers} layers of it"
    batch = f"{case.batch_size} rows of {case.input_len} tokens, --tp-size {step.tp_size}"
    least = step.num_bytes / (rates.read_bytes_per_s * step.tp_size)
    lines = [
        f"  a decode step of {model}, {batch}: {step.seconds * 1e3:.2f} ms",
        f"  reading its weights and KV takes {least * 1e3:.2f} ms at the measured rate: {least / step.seconds:.0%} of it",
    ]
    if chip is not None:
        rated = step.num_bytes / (chip.bytes_per_s * step.tp_size)
        lines.append(f"  and {rated * 1e3:.2f} ms at the maker's: {rated / step.seconds:.0%}")
    return lines


def shape_for(platform: Platform, devices: Sequence[jax.Device]) -> Shape:
    if platform.name == "cpu":
        return ON_CPU
    return LARGE if device_memory(devices[0]) * len(devices) >= LARGE_BYTES else SMALL


def step_time(platform: Platform, tp_size: int, shape: Shape) -> StepTime:
    """Start an engine on the devices, random weights and all, and time its decode steps. Raises what that raises."""
    config = json.loads(bundled()[shape.model])
    if shape.num_layers is not None:
        config["num_hidden_layers"] = shape.num_layers
    case = shape.case
    tokens = case.input_len + case.output_len
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        core = build_core(
            ServerArgs(
                model_path=folder,
                load_format="dummy",
                device=platform.name,
                tp_size=tp_size,
                max_running_requests=case.batch_size,
                chunked_prefill_size=shape.step_tokens,
                context_length=2 * tokens,
                max_total_tokens=(case.batch_size + 2) * -(-tokens // _PAGE) * _PAGE,
                random_seed=0,
                **ALONE,
            )
        )
        seconds = _median_decode_step(core, case)
    num_bytes = core.info.weight_bytes
    if not config.get("tie_word_embeddings"):  # a step reads a line of the embedding per row, as good as nothing
        num_bytes -= declare(decoder_config(config), core.info.dtype).embed.nbytes
    num_bytes += case.batch_size * (case.input_len + case.output_len / 2) * core.info.kv_bytes_per_token
    return StepTime(shape, tp_size, seconds, num_bytes)


def _median_decode_step(core: Core, case: Case) -> float:
    """Return the seconds of the median decode step of random prompts, its tokens on the host."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, core.info.vocab_size, (case.batch_size, case.input_len)).tolist()
    times = time_batch(core, prompts, case.output_len)
    assert times.median_decode_s is not None  # the case has decode steps
    return times.median_decode_s
