"""Layout of a step's plan as one i32 vector: packed by numpy on the host, unpacked by static slices in the step program."""

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
    """Columns of a StepPlan on the device, as attributes. Rows and tokens of each of the M ranks are padded to the bucket's
    S and T: a column is [M * S, …] or [M * T], rank after rank, i32 or bool. A padding row is the state's spare last row
    with num_new 0."""

    columns: dict[str, jax.Array]

    def __getattr__(self, name: str) -> jax.Array:
        if name == "columns" or name not in self.columns:
            raise AttributeError(name)
        return self.columns[name]


def param_of(params: Int[Array, "rows params"], column: Param) -> jax.Array:
    """Return one sampling parameter of each row, i32 or f32 as Param says."""
    bits = params[:, column]
    return lax.bitcast_convert_type(bits, jax.numpy.float32) if column >= Param.TEMPERATURE else bits


@dataclasses.dataclass(frozen=True)
class PlanLayout:
    """Position of each column of a plan in a bucket's vector."""

    bucket: Bucket
    page_size: int
    spare_row: int
    num_ranks: int = 1  # M
    lookahead: int = 0  # tokens beyond a step's own for which rows get pages

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The padded shape of each column."""
        tokens, rows = self.num_ranks * self.bucket.num_tokens, self.num_ranks * self.bucket.num_rows
        # A row with n new tokens begins at most 1 + (n + lookahead) // page_size pages.
        updates = rows + (tokens + rows * self.lookahead) // self.page_size
        sizes = {Per.RANK: self.num_ranks, Per.ROW: rows, Per.TOKEN: tokens, Per.UPDATE: updates}
        return {name: column.shape(sizes[column.per]) for name, column in COLUMNS.items()}

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
        """Pack a plan into i32[size], freshly allocated because the device may read it after this returns."""
        vector = np.zeros(self.size, np.int32)
        rows, tokens = self.padded_indices(plan)
        for name, column, part, shape in self._slices:
            packed, values = vector[part].reshape(shape), getattr(plan, name)
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

    def padded_indices(self, plan: StepPlan) -> tuple[np.ndarray | slice, np.ndarray | slice]:
        """Return the indices of the plan's rows among the M * S padded ones, and of its tokens among M * T."""
        if self.num_ranks == 1:
            return slice(len(plan.rows)), slice(plan.num_tokens)
        rank_of_token = np.repeat(plan.rank, plan.num_new)
        return _padded(plan.rank, self.bucket.num_rows), _padded(rank_of_token, self.bucket.num_tokens)

    def unpack(self, vector: Int[Array, " size"]) -> StepInputs:
        """Read the columns of a packed plan inside a program."""
        columns = {}
        for name, column, part, shape in self._slices:
            values = vector[part].reshape(shape)
            columns[name] = values != 0 if column.is_bool else values
        return StepInputs(columns)


def _padded(rank: np.ndarray, size: int) -> np.ndarray:
    """Return the padded index of each item. `rank` is the item's rank, ascending; each rank is padded to `size` items."""
    return rank * size + np.arange(len(rank)) - np.searchsorted(rank, rank)
