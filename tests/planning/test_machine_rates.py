"""Rates of the devices: what is repeated is really computed, and memory is respected."""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sgl_jax.planning import machine_rates
from sgl_jax.planning.cost import Rates
from sgl_jax.planning.machine_rates import NotMeasured, Probe, measure_rates, repeated_product

CPU = jax.devices("cpu")[:1]
SMALL = Probe(read_bytes=1 << 20, read_repeats=3, matmul_size=128, matmul_repeats=2)


def test_every_repeat_is_a_product_with_the_one_before() -> None:
    matrix = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    vector = np.array([1.0, -1.0], np.float32)
    product = jax.jit(repeated_product, static_argnums=2)
    assert product(matrix, vector, 3).tolist() == (matrix @ matrix @ matrix @ vector).tolist()
    assert product(matrix, matrix, 2).tolist() == (matrix @ matrix @ matrix).tolist()


def test_a_program_is_a_loop_over_one_product() -> None:
    arguments = jax.ShapeDtypeStruct((512, 512), jnp.float32), jax.ShapeDtypeStruct((512,), jnp.float32)
    text = jax.jit(repeated_product, static_argnums=2).lower(*arguments, 7).compile().as_text()
    assert (text.count(" dot("), text.count(" while(")) == (1, 1)
    assert '"known_trip_count":{"n":"7"}' in text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rates_are_work_over_the_time_of_the_fastest_run(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    reading = [99, 4, 2, 4, 4, 4, 4, 4, 4]  # seconds of each run; the first compiles
    multiplying = [1, 8, 8, 8, 8, 8, 8, 8, 9]
    times = itertools.accumulate(x for seconds in reading + multiplying for x in (0, seconds))
    monkeypatch.setattr(machine_rates.time, "perf_counter", lambda: float(next(times)))
    rates = measure_rates(CPU, dtype, SMALL)
    assert next(times, None) is None
    assert rates == Rates(2 * 2 * 128**3 / 8, 3 * (1 << 20) / 2, math.inf)


def test_several_devices_are_measured_together_but_virtual_ones_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr(machine_rates.time, "perf_counter", lambda: float(next(clock)))
    assert machine_rates._read_rate(CPU * 2, SMALL) == 2 * 3 * (1 << 20)
    assert machine_rates._matmul_rate(CPU * 2, "float32", SMALL) == 2 * 2 * 2 * 128**3
    assert measure_rates(CPU * 2, "float32", SMALL) == Rates(2 * 128**3, 3 * (1 << 20) / 2, math.inf)


def test_a_real_measurement_gives_rates() -> None:
    rates = measure_rates(CPU, "float32", SMALL)
    assert 0 < rates.bytes_per_s < 1e15
    assert 0 < rates.flops < 1e18


@pytest.mark.parametrize(("free", "size"), [(1 << 30, 512), (1 << 22, 512), (5 << 19, 384)])
def test_a_quarter_of_the_free_memory_at_most(monkeypatch: pytest.MonkeyPatch, free: int, size: int) -> None:
    made = []
    monkeypatch.setattr(machine_rates, "free_memory", lambda device: free)
    monkeypatch.setattr(machine_rates, "_best_seconds", lambda devices, make, repeats: made.append(make()) or 1.0)
    rates = measure_rates(CPU, "bfloat16", SMALL)
    assert made[0][0].shape == (size, size)
    assert rates.bytes_per_s == 3 * 4 * size**2


def test_too_little_memory_is_said() -> None:
    with pytest.raises(NotMeasured, match=r"reading .*536870912 MiB"):
        measure_rates(CPU, "float32", Probe(1 << 50, 1, 128, 1))
    with pytest.raises(NotMeasured, match=r"multiplying .*201326592 MiB"):
        measure_rates(CPU, "float32", Probe(1 << 20, 1, 1 << 22, 1))


def test_a_device_that_runs_out_of_memory_does_not_end_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory\nmore")

    monkeypatch.setattr(machine_rates, "_best_seconds", fails)
    with pytest.raises(NotMeasured, match=r": RESOURCE_EXHAUSTED: out of memory$"):
        measure_rates(CPU, "float32", SMALL)
