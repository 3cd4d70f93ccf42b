"""How near a run came to what the machine can do: bytes a decode step must read, operations a token costs.

Decode reads every weight once and the KV of every row; prefill multiplies each token with every parameter:

    bytes of a decode step = weight_bytes + rows x context x kv_bytes_per_token
    operations of n tokens = 2 x parameters_per_token x n
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from sgl_jax.engine.messages import EngineInfo
from sgl_jax.tools.benchmark.terminal import BenchmarkError


class MachineLimits(msgspec.Struct, frozen=True):
    """Rates of several devices working together, as measured."""

    memory_gb_per_s: float  # reading, 1e9 bytes
    matmul_tflop_per_s: float  # of `dtype`, 1e12 operations
    dtype: str
    device_kind: str
    num_devices: int


class ModelCost(msgspec.Struct, frozen=True):
    """The least cost of one step of the model, from the engine's own account."""

    weight_bytes: int
    kv_bytes_per_token: int
    parameters_per_token: int  # parameters a token is multiplied with: no embedding rows, only the active experts

    @classmethod
    def of(cls, info: EngineInfo) -> ModelCost:
        return cls(info.weight_bytes, info.kv_bytes_per_token, info.parameters_per_token)


@dataclass(frozen=True)
class Roofline:
    """Bounds of a model on a machine, and shares of them, 0 to 1; None where there is nothing to compute one from."""

    limits: MachineLimits
    cost: ModelCost

    def decode_share(self, rows: float | None, context: float | None, step_s: float | None) -> float | None:
        """The share of the memory bandwidth that decode steps of `rows` rows with `context` tokens each reach in `step_s`."""
        if not (rows and context and step_s and self.limits.memory_gb_per_s):
            return None
        step_bytes = self.cost.weight_bytes + rows * context * self.cost.kv_bytes_per_token
        return step_bytes / step_s / (self.limits.memory_gb_per_s * 1e9)

    def matmul_share(self, tokens: float, seconds: float) -> float | None:
        """The share of the matmul rate that computing `tokens` tokens in `seconds` reaches."""
        if not (seconds and self.limits.matmul_tflop_per_s):
            return None
        return 2 * self.cost.parameters_per_token * tokens / seconds / (self.limits.matmul_tflop_per_s * 1e12)

    def run_shares(
        self, rows: float | None, context: float | None, step_s: float | None, tokens: float, seconds: float
    ) -> dict[str, Any]:
        """Shares of a run under load: its mean decode step, and all that was computed; under their names in JSON."""
        return self.measured() | {
            "decode_rows": rows,
            "decode_context": context,
            "decode_bandwidth_share": self.decode_share(rows, context, step_s),
            "matmul_share": self.matmul_share(tokens, seconds),
        }

    def measured(self) -> dict[str, Any]:
        return {"machine_limits": msgspec.to_builtins(self.limits), "model_cost": msgspec.to_builtins(self.cost)}


def server_roofline(path: Path | None, engine: object) -> Roofline | None:
    """The limits in the file of --machine-limits, and the model's cost from `engine` of /get_server_info; None without a file.

    Raises BenchmarkError where the file or the server does not have them.
    """
    if path is None:
        return None
    try:
        cost = msgspec.convert(engine, ModelCost)
    except msgspec.ValidationError as error:
        raise BenchmarkError(f"--machine-limits: the server does not tell its model's cost: {error}") from error
    return Roofline(read_limits(path, engine if isinstance(engine, dict) else {}), cost)


def read_limits(path: Path, engine: Mapping[str, object]) -> MachineLimits:
    """Read what measure_limits wrote. `engine` is the server's account of itself.

    Raises BenchmarkError for another file, and where the server runs on other devices or in another dtype.
    """
    try:
        limits = msgspec.json.decode(path.read_bytes(), type=MachineLimits)
    except OSError as error:
        raise BenchmarkError(f"--machine-limits is {path}; it cannot be read: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise BenchmarkError(f"--machine-limits is {path}; sgl_jax.measure_limits did not write it: {error}") from error
    for name in ("device_kind", "num_devices", "dtype"):
        mine, its = getattr(limits, name), engine.get(name)
        if its not in (None, mine):
            raise BenchmarkError(
                f"--machine-limits is {path}, whose {name} is {mine}; the server's is {its}, measure its devices with "
                f"python -m sgl_jax.measure_limits --num-devices {engine.get('num_devices')} --dtype {engine.get('dtype')}"
            )
    return limits


def batch_shares(
    roofline: Roofline | None, rows: int, context: float, step_s: float | None, prefill_tokens: int, prefill_s: float
) -> dict[str, Any]:
    """Shares of a single batch: a decode step, and the prefill; under their names in JSON. All None without a roofline."""
    if roofline is None:
        return dict.fromkeys(("machine_limits", "model_cost", "decode_bandwidth_share", "prefill_matmul_share"))
    return roofline.measured() | {
        "decode_bandwidth_share": roofline.decode_share(rows, context, step_s),
        "prefill_matmul_share": roofline.matmul_share(prefill_tokens, prefill_s),
    }


def share_lines(record: Mapping[str, Any]) -> list[str]:
    """The shares of a single batch for people; one that is None has no line."""
    limits, lines = record["machine_limits"], []
    if (share := record["decode_bandwidth_share"]) is not None:
        lines.append(f"decode: {share:.1%} of the memory bandwidth ({limits['memory_gb_per_s']:.1f} GB/s)")
    if (share := record["prefill_matmul_share"]) is not None:
        rate = f"{limits['matmul_tflop_per_s']:.3g} TFLOP/s in {limits['dtype']}"
        lines.append(f"prefill: {share:.1%} of the matmul rate ({rate})")
    return lines
