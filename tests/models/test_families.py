"""Every family's config.json becomes the decoder it describes, or is refused by key and value."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints import DATA
from sgl_jax.models.decoder_config import LognScaling
from sgl_jax.models.families import decoder_config, tensor_names
from sgl_jax.models.layers import gated
from sgl_jax.models.model_errors import ModelError
from sgl_jax.models.plan import plan_weights

BASE = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "hidden_act": "silu",
}


def hf(architecture: str, **changes):
    return BASE | {"architectures": [architecture]} | changes


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("llama", {"architecture": "LlamaForCausalLM", "num_kv_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5}),
        ("llama-attn-bias", {"qkv_bias": True, "o_bias": True, "mlp_bias": True, "head_dim": 96}),
        ("llama-rope3", {"head_dim": 64, "num_kv_heads": 1}),
        ("llama-tied", {"tie_embeddings": True, "qkv_bias": False}),
        ("qwen2", {"architecture": "Qwen2ForCausalLM", "qkv_bias": True, "o_bias": False, "tie_embeddings": False}),
        ("qwen2-tied", {"tie_embeddings": True, "qkv_bias": True}),
        ("qwen2-yarn", {"head_dim": 64, "context_length": 256}),
        ("qwen3", {"architecture": "Qwen3ForCausalLM", "qk_norm": True, "qkv_bias": False, "head_dim": 64}),
        ("qwen3-tied", {"qk_norm": True, "tie_embeddings": True, "head_dim": 128}),
        ("mistral", {"architecture": "MistralForCausalLM", "sliding_windows": (16, 16, 16), "head_dim": 32}),
    ],
)
def test_oracle_configs(checkpoint: Callable[[str], Path], folder, expected):
    config = decoder_config(json.loads((checkpoint(folder) / "config.json").read_text()))
    assert {key: getattr(config, key) for key in expected} == expected
    assert len(config.rope.inv_freq) == config.head_dim // 2
    assert config.eos_token_ids == (2,)


SMALLEST = {  # keys for which no config class has a usable default
    **{"vocab_size": 100, "hidden_size": 256, "intermediate_size": 72},
    **{"num_hidden_layers": 4, "num_attention_heads": 32, "num_experts_per_tok": 3},
}


@pytest.mark.parametrize(
    ("architecture", "extra", "expected"),
    [
        ("LlamaForCausalLM", {}, {"num_kv_heads": 32, "head_dim": 8, "rms_norm_eps": 1e-6, "context_length": 2048}),
        ("MistralForCausalLM", {}, {"num_kv_heads": 8, "sliding_windows": (4096,) * 4}),
        ("Qwen2ForCausalLM", {"use_sliding_window": True}, {"num_kv_heads": 32, "sliding_windows": (None,) * 4}),
        ("Qwen3ForCausalLM", {}, {"num_kv_heads": 32, "head_dim": 128, "context_length": 32768}),
        (
            "Qwen2MoeForCausalLM",
            {"use_sliding_window": True, "max_window_layers": 3},
            {"num_kv_heads": 16, "sliding_windows": (4096, None, 4096, None), "moe.shared_intermediate_size": 5632},
        ),
        (
            "Qwen3MoeForCausalLM",
            {"use_sliding_window": True, "sliding_window": 8},
            {"num_kv_heads": 4, "head_dim": 8, "sliding_windows": (8,) * 4, "moe.num_experts": 128},
        ),
        ("MixtralForCausalLM", {}, {"num_kv_heads": 8, "rms_norm_eps": 1e-5, "theta": 1e6, "moe.num_experts": 8}),
        (
            "Gemma2ForCausalLM",
            {},
            {"num_kv_heads": 4, "head_dim": 256, "attn_logit_softcap": 50.0, "final_logit_softcap": 30.0},
        ),
        ("GemmaForCausalLM", {}, {"num_kv_heads": 16, "head_dim": 256, "norm_offset": 1.0, "tie_embeddings": True}),
        ("GraniteForCausalLM", {}, {"num_kv_heads": 32, "query_scale": 1.0, "branch_scale": 1.0, "logit_scale": 1.0}),
        ("Phi3ForCausalLM", {}, {"num_kv_heads": 32, "rms_norm_eps": 1e-5, "sliding_windows": None}),
        ("SeedOssForCausalLM", {}, {"num_kv_heads": 8, "head_dim": 128, "qkv_bias": True, "o_bias": False}),
        (
            "SmolLM3ForCausalLM",
            {"num_hidden_layers": 8},
            {"num_kv_heads": 4, "theta": 2e6, "tie_embeddings": True, "local_layers": ((False,) * 3 + (True,)) * 2},
        ),
        ("Gemma3ForCausalLM", {}, {"num_kv_heads": 4, "query_scale": 1 / 16, "attn_logit_softcap": None, "theta": 1e6}),
        (
            "Glm4MoeForCausalLM",
            {"num_key_value_heads": 4},
            {"num_kv_heads": 4, "rms_norm_eps": 1e-5, "moe.shared_intermediate_size": 1408, "qk_norm": False},
        ),
        (
            "GptOssForCausalLM",
            {},
            {"num_kv_heads": 8, "head_dim": 64, "sliding_windows": (128, None) * 2, "rms_norm_eps": 1e-5},
        ),
        (
            "DeepseekV2ForCausalLM",
            {},
            {"mla.q_lora_rank": 1536, "moe_layers": (True,) * 4, "moe.shared_intermediate_size": 2814, "moe.scale": 1},
        ),
        (
            "DeepseekV3ForCausalLM",
            {},
            {"mla.v_head_dim": 128, "moe_layers": (False,) * 3 + (True,), "moe.num_groups": 8, "moe.scale": 2.5},
        ),
    ],
)
def test_an_absent_key_means_what_transformers_classes_mean(architecture, extra, expected):
    """Defaults were checked against transformers 5.23: tokens and logprobs of random weights in these and other shapes."""
    config = decoder_config({"architectures": [architecture]} | SMALLEST | extra)
    found = dataclasses.asdict(config)
    found["theta"] = float(f"{config.rope.inv_freq[1] ** -len(config.rope.inv_freq):.4g}")
    for part in ("moe", "mla"):
        found |= {f"{part}.{key}": value for key, value in (found[part] or {}).items()}
    assert {key: found[key] for key in expected} == expected


def test_eos_is_that_of_both_configs():
    config = hf("LlamaForCausalLM", eos_token_id=2)
    assert decoder_config(config).eos_token_ids == (2,)
    assert decoder_config(config, {"eos_token_id": [5, 2, 6]}).eos_token_ids == (5, 2, 6)
    assert decoder_config(config, {"eos_token_id": 5}).eos_token_ids == (5, 2)
    assert decoder_config(config, {"bos_token_id": 1}).eos_token_ids == (2,)
    assert decoder_config(hf("LlamaForCausalLM")).eos_token_ids == ()


@pytest.mark.parametrize("architectures", [None, [], ["SomeModel"], ["SomeForSequenceClassification"]])
def test_model_type_tells_the_architecture_where_no_class_with_a_head_for_text_is_named(architectures) -> None:
    for folder in sorted((DATA / "oracle").iterdir()):
        config = json.loads((folder / "config.json").read_text())
        assert decoder_config(config | {"architectures": architectures}) == decoder_config(config), folder.name
    with pytest.raises(ModelError, match="LlamaForTokenClassification"):
        decoder_config(hf("LlamaForTokenClassification", model_type="llama"))


def test_an_unknown_architecture_lists_the_supported_ones():
    with pytest.raises(ModelError, match=r"GPT2LMHeadModel .*LlamaForCausalLM, MistralForCausalLM, .*Qwen2ForCausalLM"):
        decoder_config(hf("GPT2LMHeadModel"))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_act": "relu2"}, "hidden_act='relu2'"),
        ({"quantization_config": {"quant_method": "aqlm"}}, "quant_method 'aqlm'.* awq"),
        ({"rope_scaling": {"type": "su"}}, "'su'"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
    ],
)
def test_values_that_would_be_ignored_are_refused(changes, named):
    with pytest.raises(ModelError, match=named):
        decoder_config(hf("LlamaForCausalLM", **changes))


def gelu(x: float) -> float:
    return x / 2 * (1 + math.erf(x / math.sqrt(2)))


def gelu_tanh(x: float) -> float:
    return x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize(
    ("hidden_act", "function"),
    [
        ("silu", lambda x: x / (1 + math.exp(-x))),
        ("gelu", gelu),
        ("gelu_new", gelu_tanh),
        ("gelu_pytorch_tanh", gelu_tanh),
    ],
)
def test_activations_are_what_their_names_mean(hidden_act, function) -> None:
    activation = decoder_config(hf("LlamaForCausalLM", hidden_act=hidden_act)).activation
    values = gated(jnp.asarray([-2.5, -0.3, 0.7, 3.0]), jnp.full(4, 2.0), activation)
    np.testing.assert_allclose(values, [2 * function(x) for x in (-2.5, -0.3, 0.7, 3.0)], rtol=1e-5)


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_qwen_windows_need_use_sliding_window(architecture):
    window = {"sliding_window": 8, "max_window_layers": 3}
    assert decoder_config(hf(architecture, **window)).sliding_windows is None
    assert decoder_config(hf(architecture, use_sliding_window=True, **window)).sliding_windows == (None, None, None, 8)
    types = ["sliding_attention", "full_attention"] * 2
    config = decoder_config(hf(architecture, use_sliding_window=True, layer_types=types, **window))
    assert config.sliding_windows == (8, None, 8, None)
    with pytest.raises(ModelError, match="chunked_attention"):
        decoder_config(hf(architecture, use_sliding_window=True, layer_types=["chunked_attention"] * 4, **window))


@pytest.mark.parametrize("architecture", ["Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM"])
def test_the_number_of_qwen_s_experts_has_two_names(architecture):
    for key in ("num_experts", "num_local_experts"):
        moe = decoder_config(hf(architecture, num_experts_per_tok=2, **{key: 6})).moe
        assert moe is not None
        assert moe.num_experts == 6


def test_mistral_window_is_off_when_null_and_4096_when_absent():
    assert decoder_config(hf("MistralForCausalLM", sliding_window=None)).sliding_windows is None
    assert decoder_config(hf("MistralForCausalLM")).sliding_windows == (4096,) * 4


@pytest.mark.parametrize(
    ("architecture", "change", "named"),
    [
        ("SmolLM3ForCausalLM", {"no_rope_layers": [1, 0]}, "no_rope_layers has 2 entries.* 4 layers"),
        ("GemmaForCausalLM", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("MistralForCausalLM", {"sliding_window": 0}, "sliding_window=0"),
        ("MixtralForCausalLM", {"num_experts_per_tok": 9}, "9 of 8 experts"),
        ("LlamaForCausalLM", {"embedding_multiplier": 12.0}, "embedding_multiplier"),
    ],
)
def test_values_a_family_cannot_have_are_refused(architecture, change, named) -> None:
    with pytest.raises(ModelError, match=named):
        decoder_config(hf(architecture, **change))


def test_kv_heads_null_means_all_heads():
    for architecture in ("LlamaForCausalLM", "Qwen2ForCausalLM", "MistralForCausalLM"):
        assert decoder_config(hf(architecture, num_key_value_heads=None)).num_kv_heads == 4


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"embedding_multiplier": 12.0}, "embedding_multiplier"),
        ({"logit_scale": 0.5}, "logit_scale"),
        ({"layer_types": ["sliding_attention"] * 5, "sliding_window": 16}, "layer_types"),
        ({"eos_token_id": 512}, "eos_token_id"),
    ],
)
def test_a_config_that_would_be_computed_wrongly_is_refused(stories260k, change, named):
    config = json.loads((stories260k / "config.json").read_text()) | change
    with pytest.raises(ModelError, match=named):
        decoder_config(config)


def test_an_eos_of_minus_one_means_none(stories260k):
    config = json.loads((stories260k / "config.json").read_text()) | {"eos_token_id": -1}
    assert decoder_config(config).eos_token_ids == ()


QWEN1 = {
    "architectures": ["QWenLMHeadModel"],
    "vocab_size": 151936,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "seq_length": 128,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
}


def test_qwen1_ends_at_the_tokens_of_training_unless_dynamic_ntk_is_off(caplog):
    config = decoder_config(QWEN1)
    assert (config.context_length, config.logn_scaling) == (128, None)
    assert (config.intermediate_size, config.num_kv_heads, config.qkv_bias, config.o_bias) == (128, 4, True, False)
    assert "use_dynamic_ntk" in caplog.text
    caplog.clear()
    config = decoder_config(QWEN1 | {"use_dynamic_ntk": False})
    assert (config.context_length, config.logn_scaling) == (512, LognScaling(128, 1))
    assert decoder_config(QWEN1 | {"use_dynamic_ntk": False, "use_logn_attn": False}).logn_scaling is None
    assert not caplog.text


def test_contexts_end_with_the_first_of_dual_chunks(caplog):
    """Qwen2.5-7B-Instruct-1M has chunks of 262144 tokens."""
    chunks = {"chunk_size": 100, "local_size": 30, "original_max_position_embeddings": 100}
    config = decoder_config(hf("Qwen2ForCausalLM", dual_chunk_attention_config=chunks))
    assert config.context_length == 70
    assert "dual_chunk_attention_config" in caplog.text
    assert decoder_config(hf("Qwen2ForCausalLM", dual_chunk_attention_config=None)).context_length == 512


def test_a_qwen1_chat_model_stops_at_the_marks_of_chatml():
    assert decoder_config(QWEN1, {"eos_token_id": 151643}).eos_token_ids == (151643,)
    chat = {"eos_token_id": 151643, "chat_format": "chatml"}
    assert decoder_config(QWEN1, chat).eos_token_ids == (151643, 151645, 151644)
    assert decoder_config(QWEN1 | {"vocab_size": 512}, {"chat_format": "chatml"}).eos_token_ids == ()


BAILING = BASE | {
    "architectures": ["BailingMoeForCausalLM"],
    "moe_intermediate_size": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}
BAILING_V2 = BAILING | {"architectures": ["BailingMoeV2ForCausalLM"], "n_group": 4, "topk_group": 2}


def test_bailing_reads_what_its_two_versions_say():
    config = decoder_config(BAILING | {"num_shared_experts": 2, "first_k_dense_replace": 1, "norm_head": True})
    assert config.moe is not None
    assert (config.moe.scoring, config.moe.shared_intermediate_size, config.moe.normalise) == ("softmax", 64, False)
    assert (config.moe_layers, config.normalised_head, config.o_bias) == ((False, True, True, True), True, True)
    config = decoder_config(BAILING_V2 | {"rotary_dim": 4, "routed_scaling_factor": 2.5, "use_bias": False})
    assert config.moe is not None
    assert (config.moe.scoring, config.moe.correction_bias, config.moe.num_groups, config.moe.scale) == (
        "sigmoid",
        True,
        4,
        2.5,
    )
    assert (len(config.rope.inv_freq), config.o_bias, config.moe.shared_intermediate_size) == (2, False, 0)


GLM = BASE | {"architectures": ["Glm4MoeForCausalLM"], "num_experts_per_tok": 2}


@pytest.mark.parametrize("base", [GLM, BAILING, BAILING_V2])
def test_mtp_layers_are_counted_and_not_loaded(base):
    """Published checkpoints of GLM-4.5 have one MTP layer."""
    assert decoder_config(base).num_mtp_layers == 0
    config = decoder_config(base | {"num_nextn_predict_layers": 1})
    assert (config.num_mtp_layers, config.num_layers) == (1, 4)
    stored = dict.fromkeys(["model.layers.4.eh_proj.weight", "model.layers.5.eh_proj.weight"])
    with pytest.raises(ModelError, match=r": model\.layers\.5\.eh_proj\.weight$"):
        plan_weights(stored, config, tensor_names(config), source="a checkpoint of little else")


@pytest.mark.parametrize(
    ("config", "change", "named"),
    [
        (QWEN1, {"scale_attn_weights": False}, "scale_attn_weights=False"),
        (QWEN1, {"use_cache_quantization": True}, "use_cache_quantization"),
        (QWEN1, {"visual": {"layers": 48}}, "visual"),
        (QWEN1, {"kv_channels": 32}, "kv_channels=32"),
        (QWEN1, {"seq_length": None}, "seq_length"),
        (BAILING, {"multi_gate": True}, "multi_gate"),
        (BAILING, {"n_group": 8}, "n_group=8"),
        (BAILING, {"score_function": "sigmoid"}, "score_function"),
        (BAILING, {"norm_head": True, "tie_word_embeddings": True}, "norm_head"),
        (BAILING_V2, {"norm_topk_prob": False}, "norm_topk_prob"),
        (BAILING_V2, {"rotary_dim": 4, "partial_rotary_factor": 0.5}, "rotary_dim=4"),
        (BAILING_V2, {"moe_router_enable_shared_expert": False}, "moe_router_enable_shared_expert"),
    ],
)
def test_qwen1_and_bailing_refuse_what_they_would_ignore(config, change, named):
    decoder_config(config)
    with pytest.raises(ModelError, match=named):
        decoder_config(config | change)


GROK = {
    "head_dim": 16,
    "moe_intermediate_size": 96,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "residual_moe": True,
    "embedding_multiplier_scale": 90.5,
    "output_multiplier_scale": 0.5,
    "final_logit_softcapping": 50,
    "rope_theta": 208533496,
    "rope_type": "original",
    "scaling_factor": 16.0,
    "attn_temperature_len": 1024,
    "sliding_window_size": -1,
    "hidden_act": None,
}


def test_grok():
    config = decoder_config(hf("Grok1ForCausalLM", **GROK))
    assert (config.embed_scale, config.logit_scale, config.attn_temperature_length) == (90.5, 0.5, 1024)
    assert (config.attn_logit_softcap, config.final_logit_softcap, config.activation) == (30.0, 50.0, "gelu_tanh")
    assert config.rope.inv_freq[1] == pytest.approx(208533496 ** (-1 / 8), rel=1e-6)
    assert (config.eos_token_ids, config.tie_embeddings, config.sandwich_norms) == ((2,), False, True)
    assert config.moe is not None
    assert (config.moe.intermediate_size, config.intermediate_size) == (96, 128)
    assert (config.moe.router_softcap, config.moe.normalise, config.moe.residual_scale) == (30.0, False, 0.5**0.5)
    assert config.has_experts(0)
    assert config.has_mlp(0)
    bare = decoder_config(hf("Grok1ForCausalLM", **(GROK | {"residual_moe": False, "attn_temperature_len": -1})))
    assert not bare.has_mlp(0)
    assert bare.attn_temperature_length is None


@pytest.mark.parametrize(
    "change",
    [
        {"rope_type": "yarn_log"},
        {"sliding_window_size": 128},
        {"global_attn_every_n": 4},
        {"attn_logit_softcapping_method": "sigmoid"},
        {"moe_router_renormalize": True},
        {"hidden_act": "silu"},
        {"attn_temperature_len": 1},
    ],
)
def test_what_of_grok_is_not_built_is_refused(change):
    with pytest.raises(ModelError, match=next(iter(change))):
        decoder_config(hf("Grok1ForCausalLM", **(GROK | change)))
