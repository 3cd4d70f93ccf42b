"""Measured rates of a machine's devices, and shares of them that a run reached.

Decode reads every weight once and the KV of every row; prefill multiplies each token with every parameter:

    bytes of a decode step = weight_bytes + rows x context x kv_bytes_per_token
    operations of n tokens = 2 x parameters_per_token x n
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from sgl_jax.engine.messages import EngineInfo
from sgl_jax.tools.benchmark.arguments import Case
from sgl_jax.tools.benchmark.terminal import BenchmarkError, block, check_writable, say


class MachineLimits(msgspec.Struct, frozen=True):
    """Rates of several devices working together, as measured."""

    memory_gb_per_s: float  # reading, 1e9 bytes
    matmul_tflop_per_s: float  # products in `dtype`, 1e12 operations
    dtype: str
    device_kind: str
    num_devices: int


class ModelCost(msgspec.Struct, frozen=True):
    """The least cost of one step of the model, from the engine's own account."""

    weight_bytes: int
    kv_bytes_per_token: int
    parameters_per_token: int  # parameters a token is multiplied with: no embedding rows, only the active experts


class Roofline(msgspec.Struct, frozen=True):
    """The bounds of a model on a machine."""

    machine_limits: MachineLimits
    model_cost: ModelCost

    def shares(
        self, rows: float | None, context: float | None, step_s: float | None, tokens: float, seconds: float
    ) -> dict[str, Any]:
        """Return shares of the machine, 0 to 1, and the figures behind them, under their names in JSON.

        Decode steps take `step_s` seconds and have `rows` rows with `context` tokens each; `tokens` tokens are computed
        in `seconds`. A share without anything to compute it from is None.
        """
        limits, cost, decode = self.machine_limits, self.model_cost, None
        if rows and context and step_s:
            step_bytes = cost.weight_bytes + rows * context * cost.kv_bytes_per_token
            decode = step_bytes / step_s / (limits.memory_gb_per_s * 1e9)
        most = limits.matmul_tflop_per_s * 1e12 * seconds
        return msgspec.to_builtins(self) | {
            "decode_rows": rows,
            "decode_context": context,
            "decode_bandwidth_share": decode,
            "matmul_share": 2 * cost.parameters_per_token * tokens / most if most else None,
        }


BATCH_SHARES = {  # titles and templates in a batch's report
    "decode": "{decode_bandwidth_share:.1%} of the memory bandwidth ({memory_gb_per_s:.1f} GB/s)",
    "prefill": "{prefill_matmul_share:.1%} of the matmul rate ({matmul_tflop_per_s:.3g} TFLOP/s in {dtype})",
}


def batch_shares(
    roofline: Roofline | None, case: Case, step_s: float | None, computed: int, prefill_s: float
) -> dict[str, Any]:
    """Return shares of a batch, whose prefill computes `computed` tokens. A row's context is its prompt and half of its output."""
    if roofline is None:
        return {}
    context = case.input_len + case.output_len / 2
    shares = roofline.shares(case.batch_size, context, step_s, computed, prefill_s)
    return shares | {"prefill_matmul_share": shares.pop("matmul_share")}


def shares_block(shares: Mapping[str, Any]) -> str:
    """Format the shares of a run."""
    rows = limit_rows(MachineLimits(**shares["machine_limits"]))
    for label, name in (("Decode bandwidth share (%)", "decode_bandwidth_share"), ("Matmul share (%)", "matmul_share")):
        rows[label] = None if shares[name] is None else 100 * shares[name]
    return block("Share of the Machine", rows)


def limit_rows(limits: MachineLimits) -> dict[str, str | float | None]:
    return {
        "Device": f"{limits.num_devices} x {limits.device_kind}",
        "Memory bandwidth (GB/s)": limits.memory_gb_per_s,
        f"Matmul rate, {limits.dtype} (TFLOP/s)": limits.matmul_tflop_per_s,
    }


def main(args: argparse.Namespace, rest: Sequence[str]) -> int:
    """Measure, print, and write the file. Returns the exit code; raises BenchmarkError."""
    check_writable(args.output, "--output")
    try:
        limits = measure_limits(args.device, args.num_devices, args.dtype)
    except ValueError as error:  # no such device, or too little memory
        raise BenchmarkError(str(error)) from error
    print(block("Limits of the Machine", limit_rows(limits)))
    if args.output is not None:
        args.output.write_bytes(msgspec.json.encode(limits) + b"\n")
    return 0


def measure_limits(device: str | None, num_devices: int | None, dtype: str | None) -> MachineLimits:
    """Measure idle devices from this process, for about 2 s on two CPU cores. None: the best kind, all devices, the
    platform's dtype. Raises NoDevice or NotMeasured, both ValueErrors with a line for the user."""
    import jax

    from sgl_jax.planning.machine_rates import measure_rates
    from sgl_jax.runtime.platform import PLATFORMS, pick_devices

    wanted = next((name for name in PLATFORMS if name == device), None)
    platform, devices = pick_devices(wanted, num_devices or 1)
    if num_devices is None:
        devices = jax.local_devices(backend=platform.name)
    dtype = dtype or platform.dtype
    rates, number = measure_rates(devices, dtype), len(devices)
    kind = devices[0].device_kind
    return MachineLimits(number * rates.bytes_per_s / 1e9, number * rates.flops / 1e12, dtype, kind, number)


def measured_roofline(tool: str, info: EngineInfo) -> Roofline | None:
    """Measure the limits of the devices of an engine in this process. Returns None, and says why, where they cannot be."""
    try:
        limits = measure_limits(info.platform, info.num_devices, info.dtype)
        return Roofline(limits, msgspec.convert(info, ModelCost, from_attributes=True))
    except ValueError as error:
        say(tool, str(error))
        return None


def server_roofline(path: Path | None, engine: object) -> Roofline | None:
    """Read the limits from the file of --machine-limits, and the model's cost from `engine` of /get_server_info.

    Returns None without a file. Raises BenchmarkError where one of the two is missing, and where the server runs on other
    devices or in another dtype.
    """
    if path is None:
        return None
    try:
        limits = msgspec.json.decode(path.read_bytes(), type=MachineLimits)
    except (OSError, msgspec.DecodeError) as error:
        raise BenchmarkError(f"--machine-limits is {path}; sgl_jax.measure_limits did not write it: {error}") from error
    try:
        cost = msgspec.convert(engine, ModelCost)
    except msgspec.ValidationError as error:
        raise BenchmarkError(f"--machine-limits: the server does not tell its model's cost: {error}") from error
    told = engine if isinstance(engine, dict) else {}
    for name in ("device_kind", "num_devices", "dtype"):
        if (mine := getattr(limits, name)) != (its := told.get(name, mine)):
            raise BenchmarkError(f"--machine-limits is {path}, whose {name} is {mine}; the server's is {its}")
    return Roofline(limits, cost)
