"""How near a run came to what the machine can do: bytes a decode step must read, operations a token costs.

Decode reads every weight once and the KV of every row; prefill multiplies each token with every parameter:

    bytes of a decode step = weight_bytes + rows x context x kv_bytes_per_token
    operations of n tokens = 2 x parameters_per_token x n
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from sgl_jax.engine.messages import MachineLimits


@dataclass(frozen=True)
class ModelCost:
    """What one step of the model costs at least, from the engine's own account."""

    weight_bytes: int
    kv_bytes_per_token: int
    parameters_per_token: int  # parameters a token is multiplied with: no embedding rows, only the active experts


def decode_bandwidth_share(
    cost: ModelCost, limits: MachineLimits, rows: float, context: float, step_seconds: float
) -> float:
    """Share of the memory bandwidth that decode steps of `rows` rows with `context` tokens each reach, 0 to 1."""
    step_bytes = cost.weight_bytes + rows * context * cost.kv_bytes_per_token
    return step_bytes / step_seconds / (limits.memory_gb_per_s * 1e9)


def matmul_share(cost: ModelCost, limits: MachineLimits, tokens: float, seconds: float) -> float:
    """Share of the matmul rate that computing `tokens` tokens in `seconds` reaches, 0 to 1."""
    return 2 * cost.parameters_per_token * tokens / seconds / (limits.matmul_tflop_per_s * 1e12)


def share_lines(limits: MachineLimits, decode: float | None, prefill: float | None) -> list[str]:
    """For people; a share that is None has no line."""
    lines = []
    if decode is not None:
        lines.append(f"decode: {decode:.1%} of the memory bandwidth ({limits.memory_gb_per_s:.1f} GB/s)")
    if prefill is not None:
        rate = f"{limits.matmul_tflop_per_s:.3g} TFLOP/s in {limits.dtype}"
        lines.append(f"prefill: {prefill:.1%} of the matmul rate ({rate})")
    return lines


def limits_json(limits: MachineLimits | None, cost: ModelCost | None) -> dict[str, Any]:
    return {"machine_limits": msgspec.to_builtins(limits), "model_cost": msgspec.to_builtins(cost)}
