"""A family's table of names: the stored tensors that make up each weight."""

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

    stored: int  # number of rows it has
    order: np.ndarray  # indices of the rows that are taken, in this order


@dataclasses.dataclass(frozen=True)
class TensorNames:
    """Names as a Hugging Face checkpoint has them; `{i}` stands for the layer, `{e}` for the expert.

    A weight of several tensors is their concatenation along the output axis, the first. A name of experts without `{e}`
    is one tensor of them all, [E, …].
    """

    embed: str
    final_norm: str
    lm_head: str  # absent from a checkpoint whose head is tied to `embed`
    # By path in LayerWeights ("moe.router"). A weight that the config lacks is not looked for.
    layer: Mapping[str, tuple[str, ...]]
    # By path, for a weight that takes only some rows of its one tensor, or takes them in another order.
    rows: Mapping[str, Callable[[DecoderConfig], Rows]] = dataclasses.field(default_factory=dict)
    more: Mapping[str, str] = dataclasses.field(default_factory=dict)  # outside the layers, by path in DraftWeights
    ignored: tuple[str, ...] = ()  # patterns of stored tensors that are no weights
    view: View = dict  # shows stored tensors of another layout as if they were in ours

    def with_layer(self, names: Mapping[str, tuple[str, ...]]) -> TensorNames:
        """Return these names with some of a layer's added or changed."""
        return dataclasses.replace(self, layer={**self.layer, **names})
