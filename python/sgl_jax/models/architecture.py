"""Decides which architecture a config.json describes, and finds the text model inside a larger one.

Names of classes and model types, and defaults, are those of transformers 5.
"""

from collections.abc import Iterable, Mapping

from sgl_jax.models.model_errors import ModelError
from sgl_jax.models.raw_config import RawConfig, replaced, without

CLASSIFIER = "ForSequenceClassification"  # ending of classes with a head for labels

# A larger model whose text model is served, and the text's model_type where text_config does not say.
WHOLES: Mapping[str, str] = {
    "Gemma3ForConditionalGeneration": "gemma3_text",
    "Idefics3ForConditionalGeneration": "llama",
    "InternVLForConditionalGeneration": "qwen2",
    "LlavaForConditionalGeneration": "llama",
    "LlavaNextForConditionalGeneration": "llama",
    "LlavaOnevisionForConditionalGeneration": "qwen2",
    "Mistral3ForConditionalGeneration": "mistral",
    "Qwen2VLForConditionalGeneration": "qwen2_vl_text",
    "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl_text",
    "Qwen3VLForConditionalGeneration": "qwen3_vl_text",
    "SmolVLMForConditionalGeneration": "llama",
}
_TEXT_TYPES = {
    "gemma3_text": "Gemma3ForCausalLM",
    "qwen2_vl_text": "Qwen2ForCausalLM",
    "qwen2_5_vl_text": "Qwen2ForCausalLM",
    "qwen3_vl_text": "Qwen3ForCausalLM",
}
_LLAMA = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000}
_QWEN2_VL = {"num_key_value_heads": 8, "max_window_layers": 80, "rope_theta": 1e6, "rms_norm_eps": 1e-5}
# Values that a text_config leaves out because its class has them by default.
_DEFAULTS: Mapping[str, Mapping[str, float]] = {
    "gemma3_text": {"num_attention_heads": 8, "vocab_size": 262208},
    "llama": _LLAMA | {"intermediate_size": 11008},
    "mistral": _LLAMA | {"intermediate_size": 14336},
    "qwen2_vl_text": _QWEN2_VL,
    "qwen2_5_vl_text": _QWEN2_VL,
    "qwen3_vl_text": {"rope_theta": 5e5, "max_position_embeddings": 128000},
}


def architecture_of_type(kind: str, architectures: Iterable[str]) -> str | None:
    """Return the class of a model_type: `qwen2_moe` is Qwen2MoeForCausalLM."""
    wanted = kind.replace("_", "")
    found = (one for one in architectures if one.partition("For")[0].replace("_", "").lower() == wanted)
    return _TEXT_TYPES.get(kind) or next(found, None)


def text_model(hf: RawConfig, whole: str, architectures: Iterable[str]) -> tuple[str, RawConfig]:
    """Return class and config of the text model in a larger one of class `whole`.

    The text's keys are in text_config or, in older files of Qwen2-VL, beside those of the whole. Raises ModelError for a
    text model that is none of `architectures`.
    """
    inner = hf.get("text_config") or {}
    kind = inner.get("model_type") or WHOLES[whole]
    if (architecture := architecture_of_type(kind, architectures)) is None:
        served = ", ".join(sorted(architectures))
        raise ModelError(f"config.json: text_config.model_type is {kind!r} in {whole}; served are {served}")
    tied = {"tie_word_embeddings": hf.get("tie_word_embeddings", inner.get("tie_word_embeddings", True))}
    text = replaced({**_DEFAULTS.get(kind, {}), **without(hf, "text_config"), **inner}, tied)
    ropes = {key: plain_rope(text[key]) for key in ("rope_scaling", "rope_parameters") if text.get(key)}
    return architecture, replaced(text, ropes)


def plain_rope(rope: Mapping[str, object]) -> RawConfig:
    """Return rope settings without multimodal rope, whose three positions are one and the same in text."""
    plain = {key: "default" if value == "mrope" else value for key, value in rope.items()}
    return without(plain, "mrope_section", "mrope_interleaved")
