"""Self-test of a machine's devices: its checks, printed as they come."""

import time
from collections.abc import Callable

import jax

from sgl_jax.runtime.platform import Name, pick_devices
from sgl_jax.tools.selftest.numerics import Check, checks


def selftest(platform_name: Name, say: Callable[[str], None]) -> bool:
    """Test all devices of the platform, and `say` each line as it comes. Return whether nothing failed. Raises NoDevice."""
    started = time.perf_counter()
    platform, _ = pick_devices(platform_name)
    devices = jax.local_devices(backend=platform.name)
    say(f"\nSelf-test on {len(devices)} x {devices[0].device_kind}: the largest difference from a reference")
    passed = True
    for check in checks(platform, len(devices)):
        say(check_line(check))
        passed &= check.passed
    say(f"{'All passed' if passed else 'FAILED'}, in {time.perf_counter() - started:.0f} s")
    return passed


def check_line(check: Check) -> str:
    state = "not run" if check.error is None else "ok" if check.passed else "FAILED"
    return f"  {state:8s}{check.name:30s} {check.note or f'{check.error:.2g}, {check.allowed:g} allowed'}"
