"""A step's plan as one i32 vector: packed by numpy on the host, unpacked by static slices inside the step program."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import jax
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from sgl_jax.runtime.buckets import Bucket
from sgl_jax.step_plan import COLUMNS, Column, Param, Per, StepPlan


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepInputs:
    """A StepPlan's columns on the device, as attributes. Each of the M ranks' rows and tokens are padded to the bucket's S
    and T, rank after rank: a column is [M * S, …] or [M * T], i32 or bool. Padding rows are the state's spare last row,
    with num_new 0."""

    columns: dict[str, jax.Array]

    def __getattr__(self, name: str) -> jax.Array:
        if name == "columns" or name not in self.columns:
            raise AttributeError(name)
        return self.columns[name]


def param_of(params: Int[Array, "rows params"], column: Param) -> jax.Array:
    """One sampling parameter of each row: i32 or f32 as Param says."""
    bits = params[:, column]
    return lax.bitcast_convert_type(bits, jax.numpy.float32) if column >= Param.TEMPERATURE else bits


@dataclasses.dataclass(frozen=True)
class PlanLayout:
    """Where each column of a plan lies in a bucket's vector."""

    bucket: Bucket
    page_size: int
    spare_row: int
    num_ranks: int = 1  # M

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The padded shape of each column."""
        tokens, rows = self.num_ranks * self.bucket.num_tokens, self.num_ranks * self.bucket.num_rows
        # A row may begin a page with its first token, and fills others with the rest.
        sizes = {
            Per.RANK: self.num_ranks,
            Per.ROW: rows,
            Per.TOKEN: tokens,
            Per.UPDATE: rows + tokens // self.page_size,
        }
        return {name: _shape(column, sizes[column.per]) for name, column in COLUMNS.items()}

    @functools.cached_property
    def size(self) -> int:
        return sum(map(math.prod, self.shapes.values()))

    @functools.cached_property
    def _slices(self) -> list[tuple[str, Column, slice, tuple[int, ...]]]:
        ends = list(itertools.accumulate(map(math.prod, self.shapes.values()), initial=0))
        return [
            (name, column, slice(start, end), self.shapes[name])
            for (name, column), (start, end) in zip(COLUMNS.items(), itertools.pairwise(ends), strict=True)
        ]

    def pack(self, plan: StepPlan) -> np.ndarray:
        """i32[size], freshly allocated: the device may read it after this returns."""
        vector = np.zeros(self.size, np.int32)
        rows, tokens = self.places(plan)
        for name, column, place, shape in self._slices:
            packed, values = vector[place].reshape(shape), getattr(plan, name)
            if column.names_rows:
                (packed if column.width == 1 else packed[0])[:] = self.spare_row
            match column.per:
                case Per.RANK:
                    packed[:] = values
                case Per.ROW:
                    packed[rows] = values
                case Per.TOKEN:
                    packed[tokens] = values
                case Per.UPDATE:
                    packed[..., : values.shape[-1]] = values
        return vector

    def places(self, plan: StepPlan) -> tuple[np.ndarray | slice, np.ndarray | slice]:
        """Where a plan's rows and tokens are among the step's M * S and M * T."""
        if self.num_ranks == 1:
            return slice(len(plan.rows)), slice(plan.num_tokens)
        rank_of_token = np.repeat(plan.rank, plan.num_new)
        return _places(plan.rank, self.bucket.num_rows), _places(rank_of_token, self.bucket.num_tokens)

    def unpack(self, vector: Int[Array, " size"]) -> StepInputs:
        """The columns of a packed plan, inside a program."""
        columns = {}
        for name, column, place, shape in self._slices:
            values = vector[place].reshape(shape)
            columns[name] = values != 0 if column.is_bool else values
        return StepInputs(columns)


def _shape(column: Column, size: int) -> tuple[int, ...]:
    if column.width == 1:
        return (size,)
    return (column.width, size) if column.per is Per.UPDATE else (size, column.width)


def _places(rank: np.ndarray, room: int) -> np.ndarray:
    """The padded index of each item, given the ascending ranks of the items and the room a rank has."""
    return rank * room + np.arange(len(rank)) - np.searchsorted(rank, rank)
