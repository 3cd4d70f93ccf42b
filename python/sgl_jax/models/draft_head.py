"""Describes draft heads: EAGLE (https://arxiv.org/abs/2401.15077) and EAGLE-3 (https://arxiv.org/abs/2503.01840).

Their layouts are those of SafeAILab (github.com/SafeAILab/EAGLE), AngelSlim and SpecForge, whose first layer is
`midlayer`, and of speculators (github.com/vllm-project/speculators), which numbers all layers.
"""

import dataclasses
import re
from collections.abc import Mapping

import msgspec
import numpy as np

from sgl_jax.models import llama
from sgl_jax.models.architecture import plain_rope
from sgl_jax.models.checkpoint import Checkpoint
from sgl_jax.models.config_fields import checked_fields
from sgl_jax.models.decoder_config import DecoderConfig, DraftConfig
from sgl_jax.models.families import decoder_config
from sgl_jax.models.model_errors import ModelError
from sgl_jax.models.names import TensorNames
from sgl_jax.models.raw_config import RawConfig, replaced
from sgl_jax.models.safetensors_file import TABLES
from sgl_jax.models.stored import StoredTensor
from sgl_jax.models.stored_names import same_values
from sgl_jax.settings.speculation import Algorithm

type Tensors = Mapping[str, StoredTensor]

_EMBED, _HEAD, _FC, _D2T, _T2D = "embed_tokens.weight", "lm_head.weight", "fc.weight", "d2t", "t2d"
_ATTENTION, _FEATURE_NORM = "layers.0.self_attn.", "layers.0.hidden_norm.weight"
_IDS = "eagle_aux_hidden_state_layer_ids"
_RENAMED = (
    (r"^model\.", ""),
    (r"^midlayer\.", "layers.0."),
    (r"^layers\.([1-9]\d*)\.hidden_norm\.", r"layers.\1.input_layernorm."),  # in SGLang it is the norm of later layers
    *((rf"^aux_norm_{name}\.", f"fc_norm.{i}.") for i, name in enumerate(("low", "mid", "high"))),
)
# Drafters that guess all tokens in one pass, by names of their classes and by keys of config.json.
_ONE_PASS = re.compile(r"dflash|p_?eagle|dspark|medusa|hydra|mlp_?speculator", re.IGNORECASE)
_ONE_PASS_KEYS = ("dflash_config", "mask_token_id", "medusa_num_heads", "markov_rank")


class _Said(msgspec.Struct):
    """Keys of a head's config.json, or of eagle_config in it, beside those of its layers."""

    architectures: list[str] | None = None
    model_type: str | None = None
    speculators_model_type: str | None = None
    draft_vocab_size: int | None = None
    target_hidden_size: int | None = None
    num_aux_hidden_states: int | None = None
    eagle_aux_hidden_state_layer_ids: list[int] | None = None
    use_aux_hidden_state: bool | None = None
    norm_before_residual: bool | None = None
    norm_before_fc: bool | None = None
    fc_norm: bool | None = None
    use_aux_norm: bool | None = None
    norm_output: bool | None = None
    bias: bool | None = None  # fc has one


def head_config(
    checkpoint: Checkpoint, target: DecoderConfig, algorithm: Algorithm, embed: StoredTensor | None = None
) -> DraftConfig:
    """Describe a head. `embed` is the target's embedding, of which heads may hold a copy; None: it is not at hand. Raises
    ModelError for a head of another kind, or for another target."""
    hf, tensors, is_eagle3 = checkpoint.config, _shown(checkpoint.tensors), algorithm == "EAGLE3"
    said = checked_fields(hf | (hf.get("eagle_config") or {}), _Said)
    _refuse_other_kinds(hf, said, tensors, algorithm)
    decoder = _layers(hf, said, tensors)
    same_vocabulary(decoder, target)
    size = _draft_vocabulary(said, tensors, target.vocab_size)
    layers = _target_layers(hf, said, target.num_layers) if is_eagle3 else ()
    _same_width(said, tensors, decoder.hidden_size, target.hidden_size, len(layers))
    own_head = _HEAD in tensors or size != target.vocab_size or (is_eagle3 and not tensors)
    is_copy = embed is not None and _EMBED in tensors and same_values(tensors[_EMBED], embed)
    if is_eagle3 and decoder.tie_embeddings and not (own_head or target.tie_embeddings):
        raise ModelError(
            f"config.json sets tie_word_embeddings=True; without {_HEAD} the head is the model's, not tied"
        )
    own = {"vocab_size": size, "context_length": target.context_length, "longer": None, "tie_embeddings": False}
    is_normed = said.speculators_model_type if said.norm_before_residual is None else said.norm_before_residual
    return DraftConfig(
        kind="eagle3" if is_eagle3 else "eagle",
        decoder=dataclasses.replace(decoder, **own),
        target_layers=layers,
        own_embed=decoder.hidden_size != target.hidden_size or (_EMBED in tensors and not is_copy),
        own_head=own_head,
        is_reduced=size != target.vocab_size,
        # EAGLE-1 is trained with a bias unless the config denies it. Some published files have neither key nor bias.
        fc_bias=said.bias if said.bias is not None else "fc.bias" in tensors or not (tensors or is_eagle3),
        norm_before_fc=bool(said.norm_before_fc),
        fc_norms=bool(said.fc_norm or said.use_aux_norm),
        norm_before_residual=bool(is_normed),
        recycles_normed=bool(said.norm_output),
    )


def head_names(draft: DraftConfig) -> TensorNames:
    """Return the names of a head's tensors as speculators has them."""
    outside = {"fc": _FC, "fc_bias": "fc.bias", "fc_norm": "input_norm.weight", "feature_norm": _FEATURE_NORM}
    return TensorNames(
        embed=_EMBED,
        final_norm="norm.weight",
        lm_head=_HEAD,
        layer={path: tuple(n.removeprefix("model.") for n in names) for path, names in llama.NAMES.layer.items()},
        more=outside | {"d2t": _D2T} | {f"fc_norms[{i}]": f"fc_norm.{i}.weight" for i in range(draft.num_features)},
        ignored=(*llama.NAMES.ignored, f"^{_D2T}$", f"^{_T2D}$", f"^{_EMBED}$"),
        view=_shown,
    )


def same_vocabulary(decoder: DecoderConfig, target: DecoderConfig) -> None:
    """Raise ModelError if a draft model has other tokens than the target."""
    if decoder.vocab_size != target.vocab_size:
        raise ModelError(f"vocab_size is {decoder.vocab_size}; it must be the model's, {target.vocab_size}")


def _shown(stored: Tensors) -> dict[str, StoredTensor]:
    """Show a head's tensors under the names of speculators. A renamed norm replaces one that is stored and not used."""
    shown = {}
    for name in sorted(stored, key=lambda name: "hidden_norm" in name):
        new = name
        for pattern, ours in _RENAMED:
            new = re.sub(pattern, ours, new)
        is_table = new == _D2T and stored[name].dtype in TABLES
        shown[new] = dataclasses.replace(stored[name], supported=True) if is_table else stored[name]
    return shown


def _refuse_other_kinds(hf: RawConfig, said: _Said, tensors: Tensors, algorithm: Algorithm) -> None:
    kind = said.speculators_model_type or "eagle3"
    others = [name for name in (*(said.architectures or ()), said.model_type or "", kind) if _ONE_PASS.search(name)]
    others += [key for key in _ONE_PASS_KEYS if hf.get(key) is not None]
    others += [f"speculators_model_type {kind!r}"] if kind != "eagle3" else []
    if others:
        raise ModelError(f"{others[0]} is not served; EAGLE and EAGLE-3 heads, MTP layers and whole models are")
    found = "EAGLE3" if _FEATURE_NORM in tensors else "EAGLE" if _FC in tensors else None
    if tensors and found != algorithm:
        holds = f"it is an {found} head: give {found}" if found else f"it has neither {_FC} nor {_FEATURE_NORM}"
        raise ModelError(f"--speculative-algorithm is {algorithm}; {holds}")


def _layers(hf: RawConfig, said: _Said, tensors: Tensors) -> DecoderConfig:
    """Describe a head's layers as a small model. They are Llama's or Qwen 3's, whatever the target is."""
    own = RawConfig(hf.get("transformer_layer_config") or hf)
    is_qwen3 = said.speculators_model_type is not None and own.get("model_type") == "qwen3"
    family = "Qwen3ForCausalLM" if is_qwen3 or f"{_ATTENTION}q_norm.weight" in tensors else "LlamaForCausalLM"
    ropes = {key: plain_rope(own[key]) for key in ("rope_scaling", "rope_parameters") if own.get(key)}
    decoder = decoder_config(replaced(own, ropes | {"architectures": [family], "eos_token_id": None}))
    has_bias = decoder.qkv_bias or f"{_ATTENTION}q_proj.bias" in tensors
    return dataclasses.replace(decoder, architecture=(said.architectures or [family])[0], qkv_bias=has_bias)


def _draft_vocabulary(said: _Said, tensors: Tensors, vocab_size: int) -> int:
    """Return how many ids are drafted. Raises ModelError unless d2t and t2d, where they are stored, name that many of
    the target's, ascending: id i of the draft is id i + d2t[i] of the target."""
    d2t, t2d = tensors.get(_D2T), tensors.get(_T2D)
    size = said.draft_vocab_size or (d2t.shape[0] if d2t else vocab_size)
    if not 1 <= size <= vocab_size:
        raise ModelError(
            f"draft_vocab_size is {size}; it must be 1 to {vocab_size}, the size of the model's vocabulary"
        )
    if d2t is None:
        return size
    if d2t.shape != (size,) or d2t.dtype not in TABLES:
        raise ModelError(f"d2t is {list(d2t.shape)} of {d2t.dtype}; draft_vocab_size={size} needs {[size]} of I64")
    ids = np.arange(size) + d2t.read()
    wrong = np.flatnonzero(np.diff(ids, prepend=-1, append=vocab_size) <= 0)
    if wrong.size:
        at = min(int(wrong[0]), size - 1)
        raise ModelError(
            f"d2t makes draft id {at} the id {ids[at]}; ids must ascend, from 0 to {vocab_size - 1} at most"
        )
    if t2d is not None and (t2d.shape != (vocab_size,) or not np.array_equal(np.flatnonzero(t2d.read()), ids)):
        raise ModelError(f"t2d {list(t2d.shape)} must mark, among {vocab_size} ids, the {size} that d2t names")
    return size


def _target_layers(hf: RawConfig, said: _Said, num_layers: int) -> tuple[int, ...]:
    """Return the target layers whose inputs are the features, by default those that EAGLE-3 was published with.

    Ids at the top of config.json are inputs of layers (speculators, vLLM). In eagle_config they are outputs (SpecForge,
    SGLang), unless they cannot be: some files have the default there as inputs, or L for the last layer's output.
    Sources: https://github.com/sgl-project/sglang/pull/25454 and https://github.com/sgl-project/sglang/pull/32334.
    """
    if said.use_aux_hidden_state is False:
        return ()
    default = (2, num_layers // 2, num_layers - 3)
    ids = tuple(said.eagle_aux_hidden_state_layer_ids or default)
    are_outputs = (hf.get("eagle_config") or {}).get(_IDS) and ids != default and max(ids) < num_layers
    if said.num_aux_hidden_states not in (None, len(ids)):
        raise ModelError(f"num_aux_hidden_states is {said.num_aux_hidden_states}; {_IDS} has {len(ids)}")
    if not all(0 <= i <= num_layers for i in ids):
        raise ModelError(f"{_IDS} is {list(ids)}; the model has layers 0 to {num_layers - 1}")
    return tuple(i + 1 for i in ids) if are_outputs else ids


def _same_width(said: _Said, tensors: Tensors, own: int, width: int, num_states: int) -> None:
    """Raise ModelError for a head that was made for a target of another width, or for another number of its states."""
    if (found := said.target_hidden_size or (width if num_states else own)) != width:
        raise ModelError(f"it was made for a model with hidden_size {found}; this one has {width}")
    needed = (own, num_states * width)
    if num_states and _FC in tensors and tensors[_FC].shape != needed:
        states = f"{num_states} states of a model with hidden_size {width}"
        raise ModelError(f"{_FC} is {list(tensors[_FC].shape)}; {states} need {list(needed)}")
