"""The self-test: its checks one by one, printed as they end, and whether all passed."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib import metadata

import jax

from sgl_jax import __version__
from sgl_jax.runtime.platform import Name, pick_devices
from sgl_jax.tools.selftest.numerics import Check, checks
from sgl_jax.tools.selftest.speed import DeviceRates, StepTime, device_rates, shape_for, step_time

_VERSIONS = ("jax", "jaxlib", "libtpu")


def selftest(platform_name: Name | None, say: Callable[[str], None]) -> bool:
    """On all devices of the platform, or of the best one present; lines to `say` as they come. Whether nothing failed.
    Raises NoDevice."""
    started = time.perf_counter()
    platform, _ = pick_devices(platform_name)
    devices = jax.local_devices(backend=platform.name)
    say(f"Self-test on {len(devices)} x {devices[0].device_kind}, sgl_jax {__version__}, {_versions()}")
    say("")
    say("Numerics: the largest difference from a reference in float64")
    passed = True
    for check in checks(platform, devices):
        say(check_line(check))
        passed &= check.passed
    say("")
    say("Speed")
    try:
        rates = device_rates(platform, devices)
        for line in rate_lines(rates):
            say(line)
        # Heads divide over powers of two, and the models here have eight KV heads.
        tp_size = 1 << min(3, len(devices).bit_length() - 1) if platform.name != "cpu" else 1
        for line in step_lines(step_time(platform, tp_size, shape_for(platform, devices)), rates):
            say(line)
    except Exception as problem:  # a report with a gap is worth more than none
        say(f"  FAILED  {type(problem).__name__}: {problem}".partition("\n")[0])
        passed = False
    say("")
    say(f"{'All passed' if passed else 'FAILED'}, in {time.perf_counter() - started:.0f} s")
    return passed


def check_line(check: Check) -> str:
    if check.error is None:
        return f"  {'FAILED' if check.failed else 'not run':8s}{check.name:30s} {check.note}"
    return f"  {'ok' if check.passed else 'FAILED':8s}{check.name:30s} {check.error:.2g}, {check.allowed:g} allowed"


def rate_lines(rates: DeviceRates) -> list[str]:
    """Rates of one device: on an issue people compare chips."""
    number, chip = rates.num_devices, rates.chip
    read = rates.measured.read_bytes_per_s / number
    flops = rates.measured.matmul_flop_per_s / number
    return [
        f"  memory is read at {read / 1e9:.0f} GB/s a device{_share(read, chip.bytes_per_s if chip else None, 1e9, 'GB/s')}",
        f"  products in {rates.dtype} at {flops / 1e12:.3g} TFLOP/s a device"
        f"{_share(flops, chip.flops[rates.dtype] if chip else None, 1e12, 'TFLOP/s')}",
    ]


def step_lines(step: StepTime, rates: DeviceRates) -> list[str]:
    case, shape = step.shape.case, step.shape
    layers = "" if shape.num_layers is None else f", {shape.num_layers} layers of it"
    share = step.tp_size / rates.num_devices
    least = step.bound(rates.measured.read_bytes_per_s * share)
    lines = [
        f"  a decode step of {shape.model}{layers}, {case.batch_size} rows of {case.input_len} tokens, "
        f"--tp-size {step.tp_size}: {step.seconds * 1e3:.2f} ms",
        f"  reading its weights and KV takes {least * 1e3:.2f} ms at the measured rate: {least / step.seconds:.0%} of it",
    ]
    if rates.chip is not None:
        rated = step.bound(rates.chip.bytes_per_s * step.tp_size)
        lines.append(f"  and {rated * 1e3:.2f} ms at the maker's: {rated / step.seconds:.0%}")
    return lines


def _share(measured: float, rated: float | None, unit: float, name: str) -> str:
    return "" if rated is None else f", {measured / rated:.0%} of the maker's {rated / unit:.0f} {name}"


def _versions() -> str:
    return ", ".join(f"{name} {version}" for name in _VERSIONS if (version := _version(name)))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
