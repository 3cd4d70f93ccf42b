"""A GGUF file gives the weights it was made from."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize

from models.gguf_fixture import (
    F16,
    F32,
    HEAD_DIM,
    KV_HEADS,
    Q8_0,
    VOCAB,
    llama_cpp_permute,
    random_hf_tensors,
    write_gguf,
)
from sgl_jax.models.checkpoint import open_checkpoint
from sgl_jax.models.families import decoder_config
from sgl_jax.models.gguf_file import read_gguf
from sgl_jax.models.loader import load_weights
from sgl_jax.models.model_errors import ModelError
from sgl_jax.models.weights import head


def load(path, dtype="float32"):
    checkpoint = open_checkpoint(str(path))
    config = decoder_config(checkpoint.config, checkpoint.generation_config)
    return checkpoint, config, load_weights(checkpoint, config, dtype)


@pytest.mark.supports("stored quantised, dequantised while loading", {"llama": ["GGUF"]})
def test_round_trip_of_a_llama(tmp_path):
    tensors = random_hf_tensors()
    types = {"embed": Q8_0, "q_proj": Q8_0, "k_proj": F16, "down": Q8_0, "up": F16}
    path = write_gguf(tmp_path / "tiny.gguf", tensors, types=types)
    checkpoint, config, weights = load(path)

    assert checkpoint.format == "gguf"
    assert checkpoint.tokenizer_path == path
    assert checkpoint.dtype == "bfloat16"
    assert config.architecture == "LlamaForCausalLM"
    assert (config.vocab_size, config.num_kv_heads, config.head_dim) == (VOCAB, KV_HEADS, HEAD_DIM)
    assert (config.context_length, config.rms_norm_eps, config.tie_embeddings) == (128, 1e-5, True)
    assert config.eos_token_ids == (2,)
    np.testing.assert_allclose(config.rope.inv_freq, 5e5 ** (-np.arange(0, 16, 2) / 16), rtol=1e-6)

    def stored(name: str) -> np.ndarray:
        kind = next((t for part, t in types.items() if part in name), F32)
        return dequantize(quantize(tensors[name], kind), kind)  # rows are quantised one by one, in whatever order

    for i, layer in enumerate(weights.layers):
        attention, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        qkv = np.concatenate([stored(f"{attention}{x}_proj.weight") for x in "qkv"])
        np.testing.assert_array_equal(layer.qkv, qkv)
        np.testing.assert_array_equal(layer.o, stored(f"{attention}o_proj.weight"))
        gate_up = np.concatenate([stored(f"{mlp}{x}_proj.weight") for x in ("gate", "up")])
        np.testing.assert_array_equal(layer.gate_up, gate_up)
        np.testing.assert_array_equal(layer.down, stored(f"{mlp}down_proj.weight"))
        np.testing.assert_array_equal(layer.attn_norm, tensors[f"model.layers.{i}.input_layernorm.weight"])
    np.testing.assert_array_equal(weights.embed, stored("model.embed_tokens.weight"))
    np.testing.assert_array_equal(head(weights), stored("model.embed_tokens.weight"))


def test_a_directory_with_one_gguf_and_dummy_weights(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", random_hf_tensors())
    assert open_checkpoint(str(tmp_path)).path == path
    dummy = open_checkpoint(str(path), load_format="dummy")
    assert (dummy.format, dummy.tensors, dummy.config["vocab_size"]) == ("dummy", {}, VOCAB)
    with pytest.raises(ModelError, match="--load-format safetensors"):
        open_checkpoint(str(path), load_format="safetensors")


@pytest.mark.supports("stored quantised, dequantised while loading", {"qwen2": ["GGUF"]})
def test_qwen2_keeps_its_row_order_and_has_biases(tmp_path):
    tensors = random_hf_tensors()
    for i in range(2):
        for x, size in (("q", 64), ("k", 32), ("v", 32)):
            tensors[f"model.layers.{i}.self_attn.{x}_proj.bias"] = np.arange(size, dtype=np.float32) + i
    tensors["lm_head.weight"] = np.ones((VOCAB, 64), np.float32)
    renamed = {name: array for name, array in tensors.items() if name != "lm_head.weight"}
    path = write_gguf(tmp_path / "tiny.gguf", renamed, arch="qwen2", extra={"output.weight": tensors["lm_head.weight"]})
    _, config, weights = load(path)
    assert (config.architecture, config.qkv_bias, config.tie_embeddings) == ("Qwen2ForCausalLM", True, False)
    assert config.sliding_windows is None
    np.testing.assert_array_equal(weights.layers[0].qkv[:64], tensors["model.layers.0.self_attn.q_proj.weight"])
    np.testing.assert_array_equal(weights.layers[1].qkv_bias[64:96], np.arange(32) + 1)
    np.testing.assert_array_equal(head(weights), tensors["lm_head.weight"])


@pytest.mark.supports("stored quantised, dequantised while loading", {"qwen3": ["GGUF"]})
def test_qwen3_has_head_norms_and_its_own_head_dim(tmp_path):
    tensors = random_hf_tensors()
    for i in range(2):
        for x in "qk":
            tensors[f"model.layers.{i}.self_attn.{x}_norm.weight"] = np.full(HEAD_DIM, 1 + i, np.float32)
    lengths = {"qwen3.attention.key_length": HEAD_DIM, "qwen3.attention.value_length": HEAD_DIM}
    _, config, weights = load(write_gguf(tmp_path / "tiny.gguf", tensors, arch="qwen3", metadata=lengths))
    assert (config.architecture, config.qk_norm, config.head_dim) == ("Qwen3ForCausalLM", True, HEAD_DIM)
    np.testing.assert_array_equal(weights.layers[1].k_norm, np.full(HEAD_DIM, 2))


def test_llama_biases_are_unpermuted_too(tmp_path):
    tensors = random_hf_tensors()
    for i in range(2):
        for x, size in (("q", 64), ("k", 32), ("v", 32), ("o", 64)):
            tensors[f"model.layers.{i}.self_attn.{x}_proj.bias"] = np.arange(size, dtype=np.float32)
    _, config, weights = load(write_gguf(tmp_path / "tiny.gguf", tensors))
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (True, True, False)
    np.testing.assert_array_equal(weights.layers[0].qkv_bias, np.concatenate([np.arange(n) for n in (64, 32, 32)]))


def test_rope_scaling(tmp_path):
    base = 5e5 ** (-np.arange(0, 16, 2) / 16)
    tensors = random_hf_tensors()

    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    _, config, _ = load(write_gguf(tmp_path / "linear.gguf", tensors, metadata=linear))
    np.testing.assert_allclose(config.rope.inv_freq, base / 4, rtol=1e-6)

    yarn = {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 32,
    }
    _, config, _ = load(write_gguf(tmp_path / "yarn.gguf", tensors, metadata=yarn))
    assert config.rope.attention_factor == pytest.approx(0.1 * np.log(4) + 1)
    assert config.rope.inv_freq[-1] == pytest.approx(base[-1] / 4, rel=1e-6)

    factors = np.linspace(1, 8, 8, dtype=np.float32)  # how llama.cpp stores llama3 scaling
    _, config, _ = load(write_gguf(tmp_path / "llama3.gguf", tensors, extra={"rope_freqs.weight": factors}))
    np.testing.assert_allclose(config.rope.inv_freq, base / factors, rtol=1e-6)


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"llama.expert_count": 8}, "llama.expert_count=8"),
        ({"llama.logit_scale": 2.0}, "llama.logit_scale=2.0"),
        ({"llama.attention.sliding_window": 64}, "attention.sliding_window=64"),
        ({"llama.rope.scaling.type": "longrope"}, "'longrope'"),
        ({"llama.embedding_length": None}, "llama.embedding_length"),
        ({"llama.feed_forward_length": [96, 64]}, "feed-forward sizes per layer"),
        ({"split.count": 3}, "llama-gguf-split --merge"),
        ({"llama.pooling_type": 2}, "pooling_type 2.* 3, the last token"),
    ],
)
def test_what_is_not_honoured_is_refused(tmp_path, metadata, said):
    path = write_gguf(tmp_path / "tiny.gguf", random_hf_tensors(), metadata=metadata)
    with pytest.raises(ModelError, match=said):
        decoder_config(open_checkpoint(str(path)).config)


def test_an_unknown_architecture_lists_the_known(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", random_hf_tensors(), arch="mamba")
    with pytest.raises(ModelError, match=r"'mamba'.* llama, qwen2, qwen3"):
        open_checkpoint(str(path))


def test_an_unknown_tensor_is_reported_under_its_own_name(tmp_path):
    extra = {"blk.0.attn_sinks.weight": np.zeros(4, np.float32)}
    with pytest.raises(ModelError, match=r": blk\.0\.attn_sinks\.weight"):
        load(write_gguf(tmp_path / "tiny.gguf", random_hf_tensors(), extra=extra))


def test_a_file_cut_short_is_refused(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", random_hf_tensors())
    whole = path.read_bytes()
    for kept, said in ((len(whole) - 100, "cut short"), (300, "damaged"), (2, "tiny.gguf.* GGUF")):
        path.write_bytes(whole[:kept])
        with pytest.raises(ModelError, match=said):
            open_checkpoint(str(path))


def test_smollm2(smollm2):
    checkpoint, config, weights = load(smollm2)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (30, 9, 3, 64)
    assert (config.vocab_size, config.context_length, config.rms_norm_eps) == (49152, 8192, 1e-5)
    assert (config.tie_embeddings, config.eos_token_ids) == (True, (2,))
    assert checkpoint.total_bytes == pytest.approx(smollm2.stat().st_size, rel=0.03)

    file = read_gguf(smollm2)

    def in_the_file(name: str) -> np.ndarray:
        tensor = file.tensors[name]
        kind = GGMLQuantizationType(tensor.type)
        values, size = GGML_QUANT_SIZES[kind]
        num_bytes = np.prod(tensor.shape) // values * size
        raw = np.array(file.data[tensor.offset : tensor.offset + num_bytes]).reshape(tensor.shape[0], -1)
        return dequantize(raw, kind)

    layer = weights.layers[7]
    queries, keys = np.asarray(layer.qkv)[:576], np.asarray(layer.qkv)[576:768]
    np.testing.assert_array_equal(llama_cpp_permute(queries, 9), in_the_file("blk.7.attn_q.weight"))
    np.testing.assert_array_equal(llama_cpp_permute(keys, 3), in_the_file("blk.7.attn_k.weight"))
    np.testing.assert_array_equal(layer.down, in_the_file("blk.7.ffn_down.weight"))
