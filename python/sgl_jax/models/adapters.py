"""LoRA adapters of a launch on its devices: a slot of every adapted matrix for each of A adapters.

Products get an adapter's addend from ops/adapter_addend.py. A token without an adapter keeps the model's own product
unchanged.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from sgl_jax.models.decoder_config import DecoderConfig
from sgl_jax.models.quantised import Matrix, is_quantised
from sgl_jax.models.spec import AttentionSite, Site, WeightSpec
from sgl_jax.models.weights import Layers, LayerWeights, declare_plain, stack

_OF_ATTENTION: tuple[Site, ...] = get_args(AttentionSite)
# Products that an adapter can change. Experts and the router are none of them; a layer's dense MLP is.
ADAPTED_SITES: tuple[Site, ...] = (*_OF_ATTENTION, "gate_up", "down")


@dataclasses.dataclass(frozen=True)
class AdapterRoom:
    """Room for adapters in the programs of a launch."""

    number: int  # A
    rank: int  # R; an adapter of a lower rank is filled up with zeros
    sites: tuple[Site, ...]  # products that the adapters of the launch may change, in the order of ADAPTED_SITES


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factors[Leaf]:
    """Factors of all slots for a matrix that consists of P parts: q, k and v, gate and up, or one."""

    a: Leaf  # [P, A * R, I]
    b: tuple[Leaf, ...]  # [A * R, O] of each part


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotsInUse:
    """Slot of each token of a step, or -1."""

    own: Int[Array, " T"]  # tokens of the device's rank, which attention computes
    everyone: Int[Array, " MT"]  # tokens of all ranks, which MLPs compute

    def at(self, site: Site) -> Int[Array, " T"]:
        """Return those of the tokens that a product gets."""
        return self.own if site in _OF_ATTENTION else self.everyone


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted:
    """Matrix of the model with the factors of all slots beside it. It takes the matrix's place inside a step."""

    base: Matrix[jax.Array]
    factors: Factors[jax.Array]
    num_slots: int = dataclasses.field(metadata={"static": True})


# The factors of a layer by site, in lists or stacks like the layers of the model.
type LayerFactors[Leaf] = dict[Site, Factors[Leaf]]
type Adapters[Leaf] = list[LayerFactors[Leaf]] | tuple[LayerFactors[Leaf], ...]


def declare_adapters(
    c: DecoderConfig, slots: AdapterRoom, dtype: DTypeLike, *, stacked: bool = False
) -> Adapters[WeightSpec]:
    """Return the specs of the factors in the slots of a launch. With one slot they are those of a single adapter."""
    layers = [
        {site: _factors(spec, slots, jnp.dtype(dtype).name) for site, spec in adapted_matrices(layer, slots.sites)}
        for layer in declare_plain(c, dtype).layers
    ]
    return stack(layers, c.layer_groups()) if stacked else layers


def slot_bytes(c: DecoderConfig, slots: AdapterRoom | None, dtype: DTypeLike) -> int:
    """Return the bytes of a launch's slots, or of one device's shards of them."""
    return 0 if slots is None else sum(spec.nbytes for spec in jax.tree.leaves(declare_adapters(c, slots, dtype)))


def adapted_matrices(
    layer: LayerWeights[WeightSpec], sites: tuple[Site, ...] = ADAPTED_SITES
) -> Iterator[tuple[Site, WeightSpec]]:
    """Yield the matrices of a layer that adapters may change."""
    for path, spec in jax.tree_util.tree_flatten_with_path(layer)[0]:
        if (site := _site(path)) in sites:
            yield site, spec


def with_adapters(layers: Layers[jax.Array], adapters: Adapters[jax.Array], num_slots: int) -> Layers[jax.Array]:
    """Return the layers with an adapted matrix in the place of each that has factors."""

    def adapt(layer: LayerWeights[jax.Array], factors: LayerFactors[jax.Array]) -> LayerWeights[jax.Array]:
        def one(path: tuple[Any, ...], w: Any) -> Any:
            site = _site(path)
            return w if site is None or site not in factors else Adapted(w, factors[site], num_slots)

        return jax.tree_util.tree_map_with_path(one, layer, is_leaf=is_quantised)

    both = map(adapt, layers, adapters)
    return [*both] if isinstance(layers, list) else tuple(both)


def _site(path: tuple[Any, ...]) -> Site | None:
    """Return the product that adapters may change, at a path of a layer's tree."""
    name = jax.tree_util.keystr(path).removeprefix(".")
    return next((site for site in ADAPTED_SITES if site == name), None)


def _factors(spec: WeightSpec, slots: AdapterRoom, dtype: str) -> Factors[WeightSpec]:
    """Return the specs of a matrix's factors. A is divided like its columns, and B like its rows: what a device adds to the
    product is of the same rows, or the same part of a sum, as the product itself."""
    parts = spec.parts or spec.shape[:1]
    rows, columns = spec.axes
    a = WeightSpec((len(parts), slots.number * slots.rank, spec.shape[1]), (None, None, columns), dtype)
    b = (WeightSpec((slots.number * slots.rank, part), (None, rows), dtype) for part in parts)
    return Factors(a, tuple(b))
