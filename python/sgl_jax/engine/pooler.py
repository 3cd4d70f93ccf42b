"""Host's part of making vectors: sums of chunks become means, and a small head makes logits."""

import dataclasses
from collections.abc import Container

import numpy as np

from sgl_jax.engine.pooling_info import Pooled, PoolingInfo
from sgl_jax.scheduler.results import StepResult
from sgl_jax.step_plan import StepPlan


@dataclasses.dataclass(frozen=True)
class Head:
    """Rows of a head whose logits are wanted. It is small and stays on the host, in float32 whatever the model's dtype."""

    rows: np.ndarray  # f32[size, D]
    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, hidden: np.ndarray) -> np.ndarray:
        logits = self.rows @ hidden * np.float32(self.scale)
        return logits if self.softcap is None else np.float32(self.softcap) * np.tanh(logits / np.float32(self.softcap))


class Pooler:
    """Makes the vectors of the requests that finish."""

    def __init__(self, info: PoolingInfo, head: Head | None = None):
        self.info = info
        self._head = head
        self._sums: dict[int, np.ndarray] = {}  # f64[D] by key, of prompts of which a part is computed

    def vectors(
        self, plan: StepPlan, hidden: np.ndarray | None, step: StepResult, live: Container[int]
    ) -> list[Pooled]:
        """Take in a step's pooled states, f32[S, D]; return the vectors of the requests that finished in it. `live`: the
        keys of those that still run."""
        if hidden is None:
            return []
        of_mean = self.info.method == "mean"
        if of_mean:
            self._add(plan, hidden)
        row_of = {key: row for row, key in enumerate(plan.keys.tolist())}
        found = []
        for request, _ in step.finished:
            state = hidden[row_of[request.key]]
            if of_mean:
                state = (self._sums[request.key] / len(request.prompt)).astype(np.float32)
            vector = state if self._head is None else self._head(state)
            found.append(Pooled(request.key, vector.astype("<f4").tobytes()))
        if of_mean:
            self._sums = {key: value for key, value in self._sums.items() if key in live}
        return found

    def _add(self, plan: StepPlan, hidden: np.ndarray) -> None:
        """Add the step's sums to those of its rows. A request that begins, for the first time or again after a preemption,
        begins at its first token: for a mean nothing is taken from the cache."""
        for key, start, states in zip(plan.keys.tolist(), plan.start.tolist(), hidden.astype(np.float64), strict=True):
            self._sums[key] = states if start == 0 else self._sums[key] + states
