"""Which stored tensor goes into which weight, checked against the checkpoint as a whole."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

import jax

from sgl_jax.models.config import DecoderConfig
from sgl_jax.models.errors import ModelError
from sgl_jax.models.names import Rows, TensorNames
from sgl_jax.models.stored import StoredTensor
from sgl_jax.models.weights import WeightSpec, declare

_SHOWN = 40  # names of one kind in an error; a wrong config can make thousands


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One weight to be assembled from stored tensors."""

    path: str  # in the tree of weights: ".layers[3].qkv"
    spec: WeightSpec
    pieces: tuple[StoredTensor, ...]  # one below the other along the output axis, the first

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)


def plan_weights(
    stored: Mapping[str, StoredTensor], config: DecoderConfig, names: TensorNames, *, source: str
) -> list[Leaf]:
    """One leaf for each declared weight. Every misfit of the checkpoint is found first and told in one ModelError."""
    leaves, missing, misshapen = [], [], []
    used = {names.lm_head} if config.tie_embeddings else set()
    for key_path, spec in jax.tree_util.tree_flatten_with_path(declare(config))[0]:
        path = jax.tree_util.keystr(key_path)
        wanted = _wanted(path, spec, names)
        rows = _rows(path, config, names)
        used.update(wanted)
        pieces = tuple(stored[name] for name in wanted if name in stored)
        missing += [name for name in wanted if name not in stored]
        leaf = Leaf(path, spec, pieces)
        if len(pieces) == len(wanted):
            misshapen += _shape_errors(leaf, rows)
        leaves.append(leaf if rows is None else Leaf(path, spec, tuple(piece.take(rows.order) for piece in pieces)))
    ignored = [*names.ignored, *_extra_layers(config, names)]
    surplus = [n for n in stored if n not in used and not any(re.search(p, n) for p in ignored)]
    unreadable = [f"{t.name} ({t.dtype})" for leaf in leaves for t in leaf.pieces if not t.supported]
    problems = [
        f"{label}: {', '.join(found[:_SHOWN])}{f' and {len(found) - _SHOWN} more' if len(found) > _SHOWN else ''}"
        for label, found in (
            ("missing tensors", list(dict.fromkeys(missing))),
            ("tensors this architecture has no place for", sorted(surplus)),
            ("tensors of the wrong shape", list(dict.fromkeys(misshapen))),
            ("tensors of an unsupported type", unreadable),
        )
        if found
    ]
    if problems:
        raise ModelError(
            f"{source} does not fit its config ({config.architecture}, {config.num_layers} layers):\n  "
            + "\n  ".join(problems)
        )
    return leaves


def _wanted(path: str, spec: WeightSpec, names: TensorNames) -> tuple[str, ...]:
    if match := re.fullmatch(r"\.layers\[(\d+)\]\.([\w.]+)", path):
        layer, field = match.groups()
        matrices = range(spec.num_matrices)
        return tuple(pattern.format(i=layer, e=e) for e in matrices for pattern in names.layer[field])
    return (getattr(names, path.removeprefix(".")),)


def _rows(path: str, config: DecoderConfig, names: TensorNames) -> Rows | None:
    of = names.rows.get(path.partition("].")[2])
    return None if of is None else of(config)


def _extra_layers(config: DecoderConfig, names: TensorNames) -> list[str]:
    """Patterns of the tensors of layers that guess further tokens: they are stored after the last."""
    layer = re.escape(names.layer["attn_norm"][0].partition("{i}")[0])
    return [rf"^{layer}{config.num_layers + i}\." for i in range(config.num_extra_layers)]


def _shape_errors(leaf: Leaf, rows: Rows | None) -> list[str]:
    shapes = leaf.spec.piece_shapes
    if rows is not None:
        shapes = tuple((rows.stored, *shape[1:]) for shape in shapes)
    return [
        f"{piece.name} has {list(piece.shape)}, the config needs {list(shape)}"
        for piece, shape in zip(leaf.pieces, shapes, strict=True)
        if piece.shape != shape
    ]
