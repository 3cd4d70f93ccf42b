"""Checks types and ranges of the values in a config.json, before a family computes with them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec

from sgl_jax.models.model_errors import ModelError

# As many names of tensors are looked for as there are layers and experts.
_Count, _Natural = (Annotated[int, msgspec.Meta(ge=least, le=2**11)] for least in (1, 0))
_Width, _Size, _Length = (Annotated[int, msgspec.Meta(ge=1, le=most)] for most in (2**16, 2**24, 2**31 - 1))
_Positive = Annotated[float, msgspec.Meta(gt=0, lt=1e30)]
_Fraction = Annotated[float, msgspec.Meta(gt=0, le=1)]


def _struct(name: str, kinds: Mapping[Any, str]) -> type[msgspec.Struct]:
    """Make a type whose fields may be absent or null, from the names of each kind."""
    return msgspec.defstruct(name, [(key, kind | None, None) for kind, keys in kinds.items() for key in keys.split()])


_ROPE = {
    str: "rope_type type",
    _Positive: "factor low_freq_factor high_freq_factor rope_theta beta_fast beta_slow attention_factor",
    _Fraction: "partial_rotary_factor",
    list[_Positive]: "short_factor long_factor factors",
    _Length: "original_max_position_embeddings",
}
_Rope = _struct("_Rope", {**_ROPE, _struct("_RopeOfLayers", _ROPE): "full_attention sliding_attention"})
_Config = _struct(
    "_Config",
    {
        _Count: "num_hidden_layers",
        _Natural: "num_experts num_local_experts n_routed_experts num_experts_per_tok n_shared_experts num_shared_experts "
        "num_nextn_predict_layers first_k_dense_replace n_group topk_group",
        _Width: "num_attention_heads num_key_value_heads head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim",
        _Size: "vocab_size hidden_size intermediate_size moe_intermediate_size kv_lora_rank q_lora_rank",
        _Length: "max_position_embeddings original_max_position_embeddings seq_length",
        _Positive: "rms_norm_eps layer_norm_epsilon rope_theta rope_local_base_freq query_pre_attn_scalar swiglu_limit "
        "embedding_multiplier attention_multiplier residual_multiplier logits_scaling attn_logit_softcapping "
        "final_logit_softcapping",
        _Fraction: "partial_rotary_factor",
        str: "model_type hidden_act hidden_activation",
        bool: "tie_word_embeddings attention_bias mlp_bias use_sliding_window",
        int: "sliding_window",
        list[str]: "architectures layer_types",
        int | list[int]: "eos_token_id",
        _Rope: "rope_scaling rope_parameters",
        dict[str, object]: "text_config quantization_config",
    },
)


def check_fields(hf: Mapping[str, object]) -> None:
    """Raise ModelError for a known key of config.json with a value of the wrong type or outside its range."""
    checked_fields(hf, _Config)


def checked_fields[T](hf: Mapping[str, object], kind: type[T], within: str = "", file: str | Path = "config.json") -> T:
    """Return the keys of a file, or of the object `within` it, that are fields of `kind`. Raises ModelError for a wrong type
    or range."""
    try:
        return msgspec.convert(dict(hf), kind)
    except msgspec.ValidationError as error:
        reason, _, path = str(error).partition(" - at `$.")
        key = path.rstrip("`")
        found = hf.get(key.partition(".")[0].partition("[")[0])
        raise ModelError(f"{file}: {within}{key} is refused: {reason} (found {found!r:.80})") from error
