"""Every family's config.json becomes the decoder it describes, or is refused by key and value."""

from __future__ import annotations

import json

import pytest

from sgl_jax.models.errors import ModelError
from sgl_jax.models.families import decoder_config

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
def test_oracle_configs(shared_data, folder, expected):
    config = decoder_config(json.loads((shared_data / "oracle" / folder / "config.json").read_text()))
    assert {key: getattr(config, key) for key in expected} == expected
    assert len(config.rope.inv_freq) == config.head_dim // 2
    assert config.eos_token_ids == (2,)


def test_eos_comes_from_generation_config_first():
    config = hf("LlamaForCausalLM", eos_token_id=2)
    assert decoder_config(config).eos_token_ids == (2,)
    assert decoder_config(config, {"eos_token_id": [5, 6]}).eos_token_ids == (5, 6)
    assert decoder_config(config, {"bos_token_id": 1}).eos_token_ids == (2,)
    assert decoder_config(hf("LlamaForCausalLM")).eos_token_ids == ()


def test_an_unknown_architecture_lists_the_supported_ones():
    with pytest.raises(ModelError, match=r"GPT2LMHeadModel .*LlamaForCausalLM, MistralForCausalLM, .*Qwen2ForCausalLM"):
        decoder_config(hf("GPT2LMHeadModel"))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_act": "relu2"}, "hidden_act='relu2'"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"rope_scaling": {"type": "su"}}, "'su'"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
    ],
)
def test_values_that_would_be_ignored_are_refused(changes, named):
    with pytest.raises(ModelError, match=named):
        decoder_config(hf("LlamaForCausalLM", **changes))


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


def test_mistral_window_is_off_when_null_and_4096_when_absent():
    assert decoder_config(hf("MistralForCausalLM", sliding_window=None)).sliding_windows is None
    assert decoder_config(hf("MistralForCausalLM")).sliding_windows == (4096,) * 4


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
