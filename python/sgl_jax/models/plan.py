"""Assigns stored tensors to weights, and checks the checkpoint as a whole."""

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence

import jax
import numpy as np
from jax.typing import DTypeLike

from sgl_jax.models.decoder_config import DecoderConfig
from sgl_jax.models.model_errors import ModelError
from sgl_jax.models.names import Rows, TensorNames
from sgl_jax.models.quantised import Matrix, Quantised, is_quantised
from sgl_jax.models.safetensors_file import DTYPES
from sgl_jax.models.spec import WeightSpec
from sgl_jax.models.stored import StoredTensor, with_unit_columns
from sgl_jax.models.stored_names import named_tensors
from sgl_jax.models.weights import declare, declare_plain

_DRAFT = ".draft"  # path of the draft model's weights
# Scales of tokens, and of the KV cache, whose values stay under these names in `named_tensors`.
BESIDE_WEIGHTS = r"\.(input|output|q|k|v|kv|prob_output)_(scale|zero_point)$|\.input_global_scale$"
_LABELS = r"^score\."  # head of a sequence classifier, which is applied on the host
_KV_SCALES = "].kv_scales"
# Names of the scales of K and of V, in the attention's module: AutoFP8's, ModelOpt's, and compressed-tensors' old ones.
_KV_SCALE_NAMES = (
    ("k_scale", "k_proj.k_scale", "kv_scale", "k_proj.output_scale"),
    ("v_scale", "v_proj.v_scale", "kv_scale", "v_proj.output_scale"),
)
_SHOWN = 40  # names that an error lists of each kind of misfit; a wrong config can make thousands


@dataclasses.dataclass(frozen=True)
class Leaf:
    """Array that is to be assembled from stored tensors."""

    path: str  # in the tree of weights: ".layers[3].qkv"
    spec: WeightSpec
    pieces: tuple[StoredTensor, ...]  # to be put one below the other along the output axis

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)


def plan_weights(
    stored: Mapping[str, StoredTensor],
    config: DecoderConfig,
    names: TensorNames,
    dtype: DTypeLike = "float32",
    *,
    source: str,
    of_draft: bool = False,
) -> list[Leaf]:
    """Return one leaf for each declared array of the model, or of its draft model, of `dtype` or the weight format's.
    Raises one ModelError that lists every misfit of the checkpoint."""
    declared, prefix = flat_weights(config, dtype), _DRAFT if of_draft else ""
    if of_draft and config.draft is not None:
        config = config.draft.decoder
    stored = named_tensors(stored, config, names)
    missing, misshapen, unreadable, leaves = [], [], [], []
    used = {names.lm_head} if config.tie_embeddings or config.pooling else set()
    for whole_path, spec, held in declared:
        if whole_path.startswith(_DRAFT) != of_draft:
            continue
        path = whole_path.removeprefix(prefix)
        if path.endswith(_KV_SCALES):
            pieces, found, alone = _kv_scales(path, stored, config, names)
            used.update(found)
            missing += alone
            leaves.append((whole_path, held, pieces))
            continue
        wanted, rows = stored_parts(path, spec, config, names)
        used.update(wanted)
        pieces = []
        for name, shape in wanted.items():
            if name not in stored:
                missing.append(name)
                continue
            piece = stored[name]
            if not piece.supported:
                unreadable.append(f"{piece.name} ({piece.dtype})")
                continue
            if piece.shape != shape:
                misshapen.append(f"{piece.name} has {list(piece.shape)}, the config needs {list(shape)}")
                continue
            if path == ".lm_head" and config.normalised_head:
                piece = with_unit_columns(piece)
            pieces.append(piece.take(rows.order) if rows else piece)
        leaves.append((whole_path, held, pieces))
    problems = {
        "missing tensors": list(dict.fromkeys(missing)),
        "tensors this architecture has no place for": _surplus(stored, used, config, names),
        "tensors of the wrong shape": list(dict.fromkeys(misshapen)),
        "tensors of an unsupported type": unreadable,
    }
    if any(problems.values()):
        raise ModelError(
            f"{source} does not fit its config ({config.architecture}, {config.num_layers} layers):\n  "
            + "\n  ".join(listed(label, found) for label, found in problems.items() if found)
        )
    return [leaf for path, held, pieces in leaves for leaf in leaves_of(path, held, pieces)]


def _surplus(
    stored: Mapping[str, StoredTensor], used: Collection[str], config: DecoderConfig, names: TensorNames
) -> list[str]:
    """Return the names of the tensors that stand for nothing in the model."""
    ignored = [*names.ignored, *_mtp_layers(config, names), *((BESIDE_WEIGHTS,) if config.weight_format else ())]
    ignored += [_LABELS] if config.pooling else []
    left = [n for n in stored if n not in used and not any(re.search(p, n) for p in ignored)]
    if config.weight_format is not None:  # GPTQ's writers add biases of 0
        left = [n for n in left if not n.endswith(".bias") or stored[n].read().any()]
    return sorted(left)


def wide_weights(
    stored: Mapping[str, StoredTensor] | None, config: DecoderConfig, names: TensorNames
) -> tuple[str, ...]:
    """Return the paths of the matrices that a quantised checkpoint holds as plain floats, wholly or in part: as its tensors
    are or, without them, as its config says."""
    tensors, weight_format = named_tensors(stored or {}, config, names), config.weight_format
    found = []
    for path, spec, _ in flat_weights(dataclasses.replace(config, weight_scheme=None), "float32"):
        if not spec.is_matrix or path.startswith(_DRAFT):
            continue
        wanted, _ = stored_parts(path, spec, config, names)
        if stored:
            wide = any(name in tensors and tensors[name].dtype in DTYPES for name in wanted)
        else:
            wide = weight_format is not None and any(weight_format.skips(n.removesuffix(".weight")) for n in wanted)
        found += [path] if wide else []
    return tuple(found)


def _kv_scales(
    path: str, stored: Mapping[str, StoredTensor], config: DecoderConfig, names: TensorNames
) -> tuple[list[StoredTensor], list[str], list[str]]:
    """Return a layer's scales of K and V, their names in the checkpoint, and that which is missing beside the other; 1 where it
    has neither."""
    index = path[path.index("[") + 1 : path.index("]")]
    attention = names.layer["o"][0].format(i=index).rpartition(".")[0].rpartition(".")[0]
    found = [next((name for end in ends if (name := f"{attention}.{end}") in stored), None) for ends in _KV_SCALE_NAMES]

    theirs, alone = [name for name in found if name], []
    if (
        len(theirs) == 1 and config.kv_dtype != "int8" and config.mla is None
    ):  # int8 measures its own, latent vectors have one
        other = f"{attention}.{_KV_SCALE_NAMES[found.index(None)][0]}"
        alone = [f"{other} (beside {theirs[0]}; --kv-cache-dtype auto and int8 need neither)"]

    def scale(name: str | None) -> np.float32:
        values = np.ones(1, np.float32) if name is None else stored[name].read().astype(np.float32).reshape(-1)
        if len(values) != 1 or not 0 < values[0] < np.inf:
            raise ModelError(f"{name} is {values[:4]}; a layer has one scale for K and one for V, above 0")
        return values[0]

    def rows(start: int, stop: int) -> np.ndarray:
        return np.array([scale(name) for name in found])[start:stop]

    return [StoredTensor(path, (2,), "F32", 8, rows)], theirs, alone


def listed(label: str, found: Sequence[str]) -> str:
    """Return a line of an error: the misfits of one kind, as many as are worth reading."""
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return f"{label}: {', '.join(found[:_SHOWN])}{more}"


def flat_weights(config: DecoderConfig, dtype: DTypeLike) -> list[tuple[str, WeightSpec, Matrix[WeightSpec]]]:
    """Return each weight's path in the tree, its spec as the model defines it, and its spec as it is held."""
    plain, _ = jax.tree_util.tree_flatten_with_path(declare_plain(config, dtype))
    held = jax.tree.leaves(declare(config, dtype), is_leaf=is_quantised)
    return [(jax.tree_util.keystr(path), spec, as_held) for (path, spec), as_held in zip(plain, held, strict=True)]


def leaves_of(path: str, spec: Matrix[WeightSpec], pieces: Sequence[StoredTensor]) -> list[Leaf]:
    """Return the arrays of a weight: one, or the planes that its scheme reads from each piece."""
    if not isinstance(spec, Quantised):
        return [Leaf(path, spec, tuple(pieces))]
    read = [spec.scheme.read(piece).planes for piece in pieces]
    return [Leaf(f"{path}.{name}", plane, tuple(each[name] for each in read)) for name, plane in spec.planes.items()]


def _mtp_layers(config: DecoderConfig, names: TensorNames) -> list[str]:
    """Return name patterns of the MTP layers, which are numbered after the last decoder layer."""
    layer = re.escape(names.layer["attn_norm"][0].partition("{i}")[0])
    return [rf"^{layer}{config.num_layers + i}\." for i in range(config.num_mtp_layers)]


def stored_parts(
    path: str, spec: WeightSpec, config: DecoderConfig, names: TensorNames
) -> tuple[dict[str, tuple[int, ...]], Rows | None]:
    """Return the names of the stored tensors that make up a weight, in order, with the shape that each must have; and the
    rows that the weight takes of them, None for all."""
    if path == ".lm_head" and config.copies_head:
        path = ".embed"
    of_rows = names.rows.get(path.partition("].")[2])
    rows = of_rows(config) if of_rows else None
    return _wanted(path, spec, names, rows), rows


def _wanted(path: str, spec: WeightSpec, names: TensorNames, rows: Rows | None) -> dict[str, tuple[int, ...]]:
    match = re.fullmatch(r"\.layers\[(\d+)\]\.([\w.]+)", path)
    if match is None:
        field = path.removeprefix(".")
        return {names.more.get(field) or getattr(names, field): spec.shape}
    layer, field = match.groups()
    patterns = names.layer[field]
    if rows is not None:
        (pattern,) = patterns
        return {pattern.format(i=layer): (rows.stored, *spec.shape[1:])}
    if spec.num_experts is None or "{e}" not in patterns[0]:
        shapes = (spec.shape,) if len(patterns) == 1 else spec.piece_shapes  # its parts may be stored fused
        return dict(zip((pattern.format(i=layer) for pattern in patterns), shapes, strict=True))
    of_each = (pattern.format(i=layer, e=e) for e in range(spec.num_experts) for pattern in patterns)
    return dict(zip(of_each, spec.piece_shapes, strict=True))
