"""Which stored tensors make up each weight: a family's table, and nothing else."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class TensorNames:
    """Names as a Hugging Face checkpoint has them; `{i}` stands for the layer, `{e}` for the expert.

    A weight of several tensors is their concatenation along the output axis, the first.
    """

    embed: str
    final_norm: str
    lm_head: str  # absent from a checkpoint whose head is tied to `embed`
    layer: dict[
        str, tuple[str, ...]
    ]  # by path in LayerWeights ("moe.router"); a weight the config lacks is not looked for
    ignored: tuple[str, ...] = ()  # patterns of stored tensors that are no weights

    def with_layer(self, names: dict[str, tuple[str, ...]]) -> TensorNames:
        """These names, with some of a layer's added or changed."""
        return dataclasses.replace(self, layer=self.layer | names)
