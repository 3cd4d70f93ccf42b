"""The shard of a weight that a device holds, and so the part of it that has to be read."""

from __future__ import annotations

import dataclasses

import numpy as np

from sgl_jax.models.spec import WeightSpec
from sgl_jax.parallel.grid import Grid


@dataclasses.dataclass(frozen=True)
class Share:
    """Runs of output rows and one run of columns; the same of each of some experts."""

    experts: range
    rows: tuple[range, ...]
    columns: range | None  # None: a vector has none

    @property
    def shape(self) -> tuple[int, ...]:
        """With an axis of experts."""
        columns = () if self.columns is None else (len(self.columns),)
        return (len(self.experts), sum(map(len, self.rows)), *columns)

    def of(self, array: np.ndarray) -> np.ndarray:
        """The share of a whole weight."""
        whole = array.reshape(-1, *array.shape[-(1 if self.columns is None else 2) :])[as_slice(self.experts)]
        runs = [whole[:, as_slice(run)] for run in self.rows]
        rows = np.concatenate(runs, axis=1) if len(runs) > 1 else runs[0]
        share = rows if self.columns is None else rows[..., as_slice(self.columns)]
        return share.reshape(-1, *share.shape[2:]) if array.ndim < whole.ndim else share


def as_slice(run: range) -> slice:
    return slice(run.start, run.stop)


def share_of(spec: WeightSpec, grid: Grid, device: int) -> Share:
    """Find a device's share. Each part of the rows is divided by itself, in whole units. A part with fewer units than
    devices is repeated: neighbours get the same one (KV heads when there are more devices than heads). Raises ValueError
    where columns that stay together would be cut."""
    has_columns = spec.is_matrix
    rows_axis = spec.axes[spec.rows_axis]
    start, runs = 0, []
    for size in spec.parts or (spec.shape[spec.rows_axis],):
        i, n = grid.part(rows_axis, device)
        first = start + i * size // n // spec.unit * spec.unit
        run = range(first, first + max(size // n, spec.unit))
        if runs and runs[-1].stop == run.start:
            run = range(runs.pop().start, run.stop)
        runs.append(run)
        start += size
    return Share(
        experts=_run(spec.num_experts, grid.part("experts", device)) if spec.num_experts is not None else range(1),
        rows=tuple(runs),
        columns=_columns(spec, grid.part(spec.axes[-1], device)) if has_columns else None,
    )


def _columns(spec: WeightSpec, part: tuple[int, int]) -> range:
    size, n = spec.shape[-1], part[1]
    if size % (n * spec.column_unit):
        raise ValueError(f"{size} columns in groups of {spec.column_unit} over {n} devices: a group would be cut")
    return _run(size, part)


def _run(size: int, part: tuple[int, int]) -> range:
    i, n = part
    return range(i * size // n, (i + 1) * size // n)
