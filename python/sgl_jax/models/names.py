"""Which stored tensors make up each weight: a family's table, and nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from sgl_jax.models.stored import StoredTensor

View = Callable[[Mapping[str, StoredTensor]], Mapping[str, StoredTensor]]


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
    ignored: tuple[str, ...] = ()  # patterns of stored tensors that are no weights
    view: View = dict  # stored tensors that lie in another layout, as if in ours

    def with_layer(self, names: dict[str, tuple[str, ...]]) -> TensorNames:
        """These names, with some of a layer's added or changed."""
        return dataclasses.replace(self, layer=self.layer | names)
