"""Shows stored tensors under the names of a family's table, whatever module or larger model they were saved in.

A text model saved by itself is `model.layers.0…`, without its head `layers.0…`, and inside a model that also sees
`language_model.model.layers.0…` or `model.language_model.layers.0…`. The prefix is read off the checkpoint.
"""

from collections.abc import Mapping

import numpy as np

from sgl_jax.models.decoder_config import DecoderConfig
from sgl_jax.models.model_errors import ModelError
from sgl_jax.models.names import TensorNames
from sgl_jax.models.stored import StoredTensor

_ROWS = 1024  # compared at a time


def named_tensors(
    stored: Mapping[str, StoredTensor], config: DecoderConfig, names: TensorNames
) -> Mapping[str, StoredTensor]:
    """Return the tensors by the family's names and in its layout. Those of other parts of a larger model are left out.

    A tied matrix that was saved as the head alone is shown as the embedding. Raises ModelError where two parts of the
    checkpoint look like the text model.
    """
    ours = common_module(names)
    theirs = _prefix(stored, names, ours)
    heads = {names.lm_head, theirs + names.lm_head, _module(theirs[:-1]) + names.lm_head}
    parts = {name.removeprefix(ours).partition(".")[0] for name in (names.embed, names.final_norm, _first_norm(names))}
    named = {}
    for name, tensor in stored.items():
        rest = name.removeprefix(theirs)
        if name in heads:
            named[names.lm_head] = tensor
        elif name.startswith(theirs) and (config.part_of is None or rest.partition(".")[0] in parts):
            named[ours + rest] = tensor
        elif config.part_of is None:
            named[name] = tensor  # reported as surplus
    if config.tie_embeddings and names.embed not in named and names.lm_head in named:
        named[names.embed] = named.pop(names.lm_head)
    return names.view(config.weight_format.view(named) if config.weight_format else named)


def has_own_head(stored: Mapping[str, StoredTensor], config: DecoderConfig, names: TensorNames) -> bool:
    """Return whether a checkpoint that its config calls tied holds a head of other values than the embedding."""
    tensors = named_tensors(stored, config, names)
    embed, head = tensors.get(names.embed), tensors.get(names.lm_head)
    return embed is not None and head is not None and not same_values(embed, head)


def same_values(a: StoredTensor, b: StoredTensor) -> bool:
    """Compare two matrices, as far as they are readable."""
    if a.shape != b.shape or len(a.shape) != 2 or not (a.supported and b.supported):
        return False
    blocks = ((at, min(at + _ROWS, a.shape[0])) for at in range(0, a.shape[0], _ROWS))
    return all(_equal(a.rows(*block), b.rows(*block)) for block in blocks)


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Compare bytes where the types are the same: numpy compares foreign types, such as bfloat16, slowly."""
    return a.tobytes() == b.tobytes() if a.dtype == b.dtype else np.array_equal(a, b)


def _prefix(stored: Mapping[str, StoredTensor], names: TensorNames, ours: str) -> str:
    """Return the prefix of the text model's tensors: there are a first layer and a final norm behind it."""
    first, last = (name.removeprefix(ours) for name in (_first_norm(names), names.final_norm))
    found = {name.removesuffix(first) for name in stored if name.endswith(first)}
    found = sorted(prefix for prefix in found if prefix + last in stored and prefix == _module(prefix))
    if ours in found or not found:
        return ours
    if len(found) > 1:
        raise ModelError(f"the checkpoint holds several text models, named {', '.join(f'{p}{first}' for p in found)}")
    return found[0]


def _first_norm(names: TensorNames) -> str:
    return names.layer["attn_norm"][0].format(i=0)


def common_module(names: TensorNames) -> str:
    """Return the prefix of all tensors of the table but the head: "model." in most families."""
    prefix = names.embed
    while not (names.final_norm.startswith(prefix) and _first_norm(names).startswith(prefix)):
        prefix = _module(prefix[:-1])
    return prefix


def _module(name: str) -> str:
    """Return the name up to its last dot, dot included."""
    return name[: name.rfind(".") + 1]
