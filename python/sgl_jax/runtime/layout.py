"""A step's plan as one i32 vector: packed by numpy on the host, unpacked by static slices inside the step program."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from sgl_jax.runtime.buckets import Bucket
from sgl_jax.step_plan import Param, StepPlan


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepInputs:
    """A StepPlan on the device. Each of the M ranks' rows and tokens are padded to the bucket's S and T, rank after rank.
    Padding rows point at the state's spare last row."""

    num_short: jax.Array  # i32[M]
    rows: jax.Array  # i32[M * S]
    start: jax.Array  # i32[M * S]
    num_new: jax.Array  # i32[M * S], 0 in padding
    samples: jax.Array  # bool[M * S]
    from_device: jax.Array  # bool[M * S]
    next_token: jax.Array  # i32[M * S]
    params: jax.Array  # i32[M * S, len(Param)]
    tokens: jax.Array  # i32[M * T]
    page_updates: jax.Array  # i32[3, U]

    def by_row(self) -> dict[str, jax.Array]:
        """The fields that have a value for each row, by name."""
        names = ("rows", "start", "num_new", "samples", "from_device", "next_token", "params")
        return {name: getattr(self, name) for name in names}

    def param(self, column: Param) -> jax.Array:
        """One sampling parameter of each row, [M * S]: i32 or f32 as Param says."""
        bits = self.params[:, column]
        return lax.bitcast_convert_type(bits, jnp.float32) if column >= Param.TEMPERATURE else bits


@dataclasses.dataclass(frozen=True)
class PlanLayout:
    """Where each part of a bucket's vector lies."""

    bucket: Bucket
    page_size: int
    spare_row: int
    num_ranks: int = 1  # M

    @functools.cached_property
    def parts(self) -> dict[str, tuple[int, ...]]:
        m = self.num_ranks
        t, s = m * self.bucket.num_tokens, m * self.bucket.num_rows
        columns = ("rows", "start", "num_new", "samples", "from_device", "next_token")
        return {
            "num_short": (m,),
            **dict.fromkeys(columns, (s,)),
            "params": (s, len(Param)),
            "tokens": (t,),
            "page_updates": (3, s + t // self.page_size),
        }

    @functools.cached_property
    def size(self) -> int:
        return sum(map(math.prod, self.parts.values()))

    @functools.cached_property
    def _places(self) -> list[tuple[str, slice, tuple[int, ...]]]:
        ends = list(itertools.accumulate(map(math.prod, self.parts.values()), initial=0))
        return [
            (name, slice(start, end), shape)
            for (name, shape), (start, end) in zip(self.parts.items(), itertools.pairwise(ends), strict=True)
        ]

    def _split(self, vector):
        return {name: vector[place].reshape(shape) for name, place, shape in self._places}

    def pack(self, plan: StepPlan) -> np.ndarray:
        """i32[size], freshly allocated: the device may read it after this returns."""
        vector = np.zeros(self.size, np.int32)
        parts = self._split(vector)
        rows, tokens = self.places(plan)
        parts["num_short"][:] = plan.num_short
        parts["rows"][:] = self.spare_row
        for name in ("rows", "start", "num_new", "samples", "from_device", "next_token", "params"):
            parts[name][rows] = getattr(plan, name)
        parts["tokens"][tokens] = plan.tokens
        parts["page_updates"][0] = self.spare_row
        parts["page_updates"][:, : plan.page_updates.shape[1]] = plan.page_updates
        return vector

    def places(self, plan: StepPlan) -> tuple[np.ndarray | slice, np.ndarray | slice]:
        """Where a plan's rows and tokens are among the step's M * S and M * T."""
        if self.num_ranks == 1:
            return slice(len(plan.rows)), slice(plan.num_tokens)
        rank_of_token = np.repeat(plan.rank, plan.num_new)
        return _places(plan.rank, self.bucket.num_rows), _places(rank_of_token, self.bucket.num_tokens)

    def unpack(self, vector: Int[Array, " size"]) -> StepInputs:
        parts = self._split(vector)
        flags = {name: parts.pop(name) != 0 for name in ("samples", "from_device")}
        return StepInputs(**parts, **flags)


def _places(rank: np.ndarray, room: int) -> np.ndarray:
    """Those of each rank, which come together and in order, from the beginning of the rank's room."""
    return rank * room + np.arange(len(rank)) - np.searchsorted(rank, rank)
