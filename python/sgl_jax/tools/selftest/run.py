"""Self-test of a machine's devices: checks and speed, printed as they come."""

from __future__ import annotations

import time
from collections.abc import Callable

import jax

from sgl_jax import __version__
from sgl_jax.runtime.platform import Name, pick_devices
from sgl_jax.tools.environment.packages import installed
from sgl_jax.tools.selftest.numerics import Check, checks
from sgl_jax.tools.selftest.speed import speed_lines


def selftest(platform_name: Name | None, say: Callable[[str], None]) -> bool:
    """Test all devices of the platform, or of the best one present, and `say` each line as it comes. Return whether
    nothing failed. Raises NoDevice."""
    started = time.perf_counter()
    platform, _ = pick_devices(platform_name)
    devices = jax.local_devices(backend=platform.name)
    found = {name: installed(name).version for name in ("jax", "jaxlib", "libtpu")}
    versions = ", ".join(f"{name} {version}" for name, version in found.items() if version)
    say(f"Self-test on {len(devices)} x {devices[0].device_kind}, sgl_jax {__version__}, {versions}")
    say("\nNumerics: the largest difference from a reference in float64")
    passed = True
    for check in checks(platform, devices):
        say(check_line(check))
        passed &= check.passed
    say("\nSpeed")
    try:
        for line in speed_lines(platform, devices):
            say(line)
    except Exception as problem:  # a report with a gap is worth more than none
        say(f"  FAILED  {type(problem).__name__}: {problem}".partition("\n")[0])
        passed = False
    say(f"\n{'All passed' if passed else 'FAILED'}, in {time.perf_counter() - started:.0f} s")
    return passed


def check_line(check: Check) -> str:
    if check.error is None:
        return f"  {'FAILED' if check.failed else 'not run':8s}{check.name:30s} {check.note}"
    return f"  {'ok' if check.passed else 'FAILED':8s}{check.name:30s} {check.error:.2g}, {check.allowed:g} allowed"
