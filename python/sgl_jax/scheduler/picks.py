"""Rows chosen for the step under construction."""

import dataclasses

import numpy as np

from sgl_jax.step_plan import AdapterLoad, RowLoad


@dataclasses.dataclass(slots=True)
class Picks:
    width: int  # W
    most_rows: int  # rows of a rank for which it was chosen
    num_decoding: int  # the number of rows that decode
    budget: list[int]  # [M] prompt tokens for which each rank has room left
    rows: list[np.ndarray]
    num_new: list[np.ndarray]
    page_updates: list[np.ndarray]
    loads: list[RowLoad] = dataclasses.field(default_factory=list)
    adapter_loads: list[AdapterLoad] = dataclasses.field(default_factory=list)
    num_cached_tokens: int = 0  # tokens that the admitted requests found in the cache
