"""Measured rates of a machine's devices, for `python -m sgl_jax.measure_limits` and the tools that run in a process of their own."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import msgspec

from sgl_jax.engine.messages import EngineInfo
from sgl_jax.tools.benchmark.arguments import new_parser, whole_number
from sgl_jax.tools.benchmark.roofline import MachineLimits
from sgl_jax.tools.benchmark.serving_report import block, check_writable
from sgl_jax.tools.benchmark.terminal import BenchmarkError


def parse_measure_limits(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser(
        "python -m sgl_jax.measure_limits [flags]",
        "Measures how fast this machine's devices read memory and multiply matrices. Nothing else should run on them: "
        "measure before a server is started. Takes seconds.",
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "gpu", "tpu"), help="kind of devices (default: the best there is)")
    add("--num-devices", type=whole_number(1), metavar="N", help="as many as the server takes (default: all)")
    add("--dtype", choices=("bfloat16", "float32"), help="of the matrices, as the server computes (default: bfloat16)")
    add("--output", type=Path, metavar="FILE", help="write the limits as JSON, for --machine-limits of other tools")
    return parser.read(argv)


def show_limits(args: argparse.Namespace) -> int:
    """Measure, print, and write the file. Returns the exit code; raises BenchmarkError."""
    check_writable(args.output, "--output")
    try:
        limits = measure_limits(args.device, args.num_devices, args.dtype)
    except ValueError as error:  # no such device, or too little memory
        raise BenchmarkError(str(error)) from error
    n = limits.num_devices
    rows = {
        "Device": f"{n} x {limits.device_kind}",
        "Memory bandwidth (GB/s)": limits.memory_gb_per_s,
        "Memory bandwidth of each (GB/s)": limits.memory_gb_per_s / n,
        f"Matmul rate, {limits.dtype} (TFLOP/s)": limits.matmul_tflop_per_s,
        "Matmul rate of each (TFLOP/s)": limits.matmul_tflop_per_s / n,
    }
    print(block("Limits of the Machine", rows))
    if args.output is not None:
        args.output.write_bytes(msgspec.json.encode(limits) + b"\n")
    return 0


def measure_limits(
    device: str | None = None, num_devices: int | None = None, dtype: str | None = None
) -> MachineLimits:
    """Measure the devices from this process, for about 2 s on two CPU cores. None: the best kind, all devices, the
    platform's dtype. Raises NoDevice or NotMeasured, both ValueErrors with a line for the user."""
    import jax

    from sgl_jax.planning.machine_rates import measure_rates
    from sgl_jax.runtime.platform import PLATFORMS, pick_devices

    wanted = next((name for name in PLATFORMS if name == device), None)
    platform, devices = pick_devices(wanted, num_devices or 1)
    if num_devices is None:
        devices = jax.local_devices(backend=platform.name)
    dtype = dtype or platform.dtype
    rates = measure_rates(devices, dtype)
    kind = devices[0].device_kind
    return MachineLimits(rates.read_bytes_per_s / 1e9, rates.matmul_flop_per_s / 1e12, dtype, kind, len(devices))


def limits_of(info: EngineInfo) -> MachineLimits:
    """Measure the devices of an engine in this process, which must be idle. Raises NotMeasured, a ValueError."""
    return measure_limits(info.platform, info.num_devices, info.dtype)
