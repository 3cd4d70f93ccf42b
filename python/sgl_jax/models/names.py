"""Which stored tensors make up each weight: a family's table, and nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from sgl_jax.models.decoder_config import DecoderConfig
from sgl_jax.models.stored import StoredTensor

View = Callable[[Mapping[str, StoredTensor]], Mapping[str, StoredTensor]]


class Rows(NamedTuple):
    """Some rows of a stored tensor."""

    stored: int  # how many it has
    order: np.ndarray  # those that are taken, in this order


@dataclasses.dataclass(frozen=True)
class TensorNames:
    """Names as a Hugging Face checkpoint has them; `{i}` stands for the layer, `{e}` for the expert.

    A weight of several tensors is their concatenation along the output axis, the first. A name of experts without `{e}`
    is one tensor of them all, [E, …].
    """

    embed: str
    final_norm: str
    lm_head: str  # absent from a checkpoint whose head is tied to `embed`
    layer: dict[
        str, tuple[str, ...]
    ]  # by path in LayerWeights ("moe.router"); a weight the config lacks is not looked for
    rows: dict[str, Callable[[DecoderConfig], Rows]] = dataclasses.field(
        default_factory=dict
    )  # by path, for a weight of one tensor that takes some of its rows only, or in another order
    ignored: tuple[str, ...] = ()  # patterns of stored tensors that are no weights
    view: View = dict  # stored tensors that lie in another layout, as if in ours

    def with_layer(self, names: dict[str, tuple[str, ...]]) -> TensorNames:
        """These names, with some of a layer's added or changed."""
        return dataclasses.replace(self, layer=self.layer | names)
