"""Finds the shard of a weight that a device holds, which is the part that has to be read."""

import dataclasses

from sgl_jax.models.spec import WeightSpec
from sgl_jax.parallel.grid import Grid


@dataclasses.dataclass(frozen=True)
class Shard:
    """Part of a weight that a device holds: for each of some experts, the same runs of output rows and of columns."""

    experts: range
    rows: tuple[range, ...]
    columns: range | None  # None for a vector

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the part, with an axis of experts even for dense weights."""
        columns = () if self.columns is None else (len(self.columns),)
        return (len(self.experts), sum(map(len, self.rows)), *columns)


def as_slice(run: range) -> slice:
    return slice(run.start, run.stop)


def shard_of(spec: WeightSpec, grid: Grid, device: int) -> Shard:
    """Find a device's shard. Each part of the rows is divided by itself, in whole units.

    A part with fewer units than devices is replicated: neighbours hold the same unit (KV heads when there are more
    devices than heads). Raises ValueError where columns that stay together would be cut.
    """
    start, runs = 0, []
    for size, own in zip(spec.parts or (spec.shape[spec.rows_axis],), rows_of_parts(spec, grid, device), strict=True):
        run = range(start + own.start, start + own.stop)
        if runs and runs[-1].stop == run.start:
            run = range(runs.pop().start, run.stop)
        runs.append(run)
        start += size
    experts = range(1) if spec.num_experts is None else _run(spec.num_experts, grid.part("experts", device))
    if not spec.is_matrix:
        return Shard(experts, tuple(runs), None)
    columns, n = spec.shape[-1], grid.part(spec.axes[-1], device)[1]
    if columns % (n * spec.column_unit):
        raise ValueError(f"{columns} columns in groups of {spec.column_unit} over {n} devices: a group would be cut")
    return Shard(experts, tuple(runs), _run(columns, grid.part(spec.axes[-1], device)))


def rows_of_parts(spec: WeightSpec, grid: Grid, device: int) -> list[range]:
    """Return the rows of each part, counted from the part's first, that a device holds (see shard_of)."""
    found = []
    for size in spec.parts or (spec.shape[spec.rows_axis],):
        i, n = grid.part(spec.axes[spec.rows_axis], device)
        first = i * size // n // spec.unit * spec.unit
        found.append(range(first, first + max(size // n, spec.unit)))
    return found


def _run(size: int, part: tuple[int, int]) -> range:
    i, n = part
    return range(i * size // n, (i + 1) * size // n)
