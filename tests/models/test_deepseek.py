"""DeepSeek's configs are translated, and latent attention over loaded weights is the published formula over stored ones."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from messages import says
from sgl_jax.models.checkpoint import open_checkpoint
from sgl_jax.models.decoder_config import DecoderConfig
from sgl_jax.models.families import decoder_config
from sgl_jax.models.layers import rope_table
from sgl_jax.models.loader import load_weights, random_weights
from sgl_jax.models.mla import latent_attention
from sgl_jax.models.model_errors import ModelError
from sgl_jax.models.weights import Weights, declare, parameters_per_token
from sgl_jax.parallel.grid import Grid

V2, V3 = "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"
TINY = {
    "architectures": [V3],
    "vocab_size": 32,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "max_position_embeddings": 128,
    "rope_theta": 100.0,
    "kv_lora_rank": 10,
    "q_lora_rank": 7,
    "qk_nope_head_dim": 5,
    "qk_rope_head_dim": 6,
    "v_head_dim": 4,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "moe_intermediate_size": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 1,
}
YARN = {"type": "yarn", "factor": 4, "mscale": 1.0, "mscale_all_dim": 0.7, "original_max_position_embeddings": 32}
V2_ROUTING = {"architectures": [V2], "topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0}
# config.json of DeepSeek-V3, where it differs from TINY
DEEPSEEK_V3 = {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "first_k_dense_replace": 3,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
}


def config(**changes) -> DecoderConfig:
    return decoder_config(TINY | changes)


def test_v3_chooses_by_biased_sigmoid_scores_from_the_best_pairs_of_groups() -> None:
    c = config()
    assert c.moe is not None
    moe = (c.moe.scoring, c.moe.correction_bias, c.moe.group_score, c.moe.normalise, c.moe.scale, c.moe.num_groups)
    assert moe == ("sigmoid", True, "top2", True, 2.5, 2)
    assert c.moe.shared_intermediate_size == 16
    assert c.moe_layers == (False, True)
    assert (c.num_kv_heads, c.key_dim, c.value_dim, c.output_dim) == (1, 16, 10, 4)


def test_v2_chooses_by_softmax_with_or_without_groups() -> None:
    grouped, greedy = config(**V2_ROUTING).moe, config(**V2_ROUTING | {"topk_method": "greedy"}).moe
    assert grouped is not None
    assert greedy is not None
    assert (grouped.scoring, grouped.correction_bias, grouped.group_score) == ("softmax", False, "max")
    assert (grouped.normalise, grouped.scale) == (False, 16.0)
    assert (grouped.num_groups, greedy.num_groups) == (2, 1)


def test_experts_come_every_few_layers_after_the_dense_ones() -> None:
    c = config(num_hidden_layers=6, first_k_dense_replace=1, moe_layer_freq=2)
    assert c.moe_layers == (False, False, True, False, True, False)


def test_yarn_scales_the_scores_by_the_square_of_mscale_all_dim() -> None:
    assert config().scale == 11**-0.5
    yarn = config(rope_scaling=YARN)
    assert yarn.scale == pytest.approx(11**-0.5 * (1 + 0.07 * math.log(4)) ** 2)
    assert yarn.rope.attention_factor == pytest.approx((1 + 0.1 * math.log(4)) / (1 + 0.07 * math.log(4)))
    assert len(yarn.rope.inv_freq) == 3
    without = {key: value for key, value in YARN.items() if "mscale" not in key}
    assert config(rope_scaling=without).scale == 11**-0.5


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"attention_bias": True}, r"attention_bias=True.* DeepseekV3ForCausalLM .*False"),
        ({"scoring_func": "softmax"}, "scoring_func='softmax'"),
        ({"topk_method": "greedy"}, "topk_method='greedy'.* 'noaux_tc'"),
        (V2_ROUTING | {"topk_method": "noaux_tc"}, "topk_method='noaux_tc'.* 'greedy' .*'group_limited_greedy'"),
        (V2_ROUTING | {"norm_topk_prob": True}, "norm_topk_prob=True"),
        ({"kv_lora_rank": None}, "kv_lora_rank"),
        ({"n_group": None}, "n_group"),
        ({"n_group": 3}, "n_routed_experts=4 .* n_group=3"),
    ],
)
def test_what_would_be_computed_otherwise_is_refused(changes: dict, named: str) -> None:
    with pytest.raises(ModelError, match=named):
        config(**changes)


def test_parameters_of_deepseek_v3() -> None:
    """Published are 671 billion, embedding included, of which 37 billion are used for a token."""
    c = config(**DEEPSEEK_V3)
    total = sum(math.prod(spec.shape) for spec in jax.tree.leaves(declare(c, "float32")))
    assert round(total / 1e9) == 671
    attention = 7168 * (1536 + 576) + 128 * (192 * 1536 + (128 + 128) * 512) + 7168 * 128 * 128
    expert = 3 * 7168 * 2048
    met = 61 * attention + 3 * 3 * 7168 * 18432 + 58 * (256 * 7168 + 9 * expert) + 129280 * 7168
    assert parameters_per_token(c) == met
    assert round((met + 129280 * 7168) / 1e9) == 38  # DeepSeek's 37 leaves out one of embedding and head


def test_a_device_holds_whole_latents_and_its_shard_of_the_heads() -> None:
    one, four = declare(config(**DEEPSEEK_V3), "float32"), declare(config(**DEEPSEEK_V3).shard(Grid(4)), "float32")
    a, b = one.layers[0].mla, four.layers[0].mla
    assert (a.q_up.shape, b.q_up.shape) == ((128 * 192, 1536), (32 * 192, 1536))
    assert (a.k_up.shape, b.k_up.shape) == ((128 * 128, 512), (32 * 128, 512))
    assert (a.v_up.shape, b.v_up.shape) == ((128 * 128, 512), (32 * 128, 512))
    assert a.q_down == b.q_down
    assert a.kv_down == b.kv_down


# --- a checkpoint of the family ---------------------------------------------------------------------------------------


def stored_tensors(hf: dict, extra_layers: int = 0) -> dict[str, np.ndarray]:
    """Return random tensors with the names and shapes of DeepSeek's own code."""
    rng, heads, d = np.random.default_rng(0), hf["num_attention_heads"], hf["hidden_size"]
    nope, rope, value, rank = (hf[k] for k in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank"))
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (hf["vocab_size"], d),
        "model.norm.weight": (d,),
        "lm_head.weight": (hf["vocab_size"], d),
    }

    def mlp(prefix: str, size: int) -> dict[str, tuple[int, ...]]:
        return {
            f"{prefix}.{name}_proj.weight": (d, size) if name == "down" else (size, d)
            for name in ("gate", "up", "down")
        }

    for i in range(hf["num_hidden_layers"] + extra_layers):
        layer = f"model.layers.{i}"
        attention, size = f"{layer}.self_attn", hf["moe_intermediate_size"]
        shapes |= {f"{layer}.input_layernorm.weight": (d,), f"{layer}.post_attention_layernorm.weight": (d,)}
        if hf["q_lora_rank"]:
            shapes[f"{attention}.q_a_proj.weight"] = (hf["q_lora_rank"], d)
            shapes[f"{attention}.q_a_layernorm.weight"] = (hf["q_lora_rank"],)
        queries = "q_b_proj" if hf["q_lora_rank"] else "q_proj"
        shapes[f"{attention}.{queries}.weight"] = (heads * (nope + rope), hf["q_lora_rank"] or d)
        shapes[f"{attention}.kv_a_proj_with_mqa.weight"] = (rank + rope, d)
        shapes[f"{attention}.kv_a_layernorm.weight"] = (rank,)
        shapes[f"{attention}.kv_b_proj.weight"] = (heads * (nope + value), rank)
        shapes[f"{attention}.o_proj.weight"] = (d, heads * value)
        if i < hf["first_k_dense_replace"]:
            shapes |= mlp(f"{layer}.mlp", hf["intermediate_size"])
            continue
        shapes[f"{layer}.mlp.gate.weight"] = (hf["n_routed_experts"], d)
        shapes[f"{layer}.mlp.gate.e_score_correction_bias"] = (hf["n_routed_experts"],)
        for e in range(hf["n_routed_experts"]):
            shapes |= mlp(f"{layer}.mlp.experts.{e}", size)
        shapes |= mlp(f"{layer}.mlp.shared_experts", size * hf["n_shared_experts"])
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def load(folder: Path, hf: dict, tensors: dict[str, np.ndarray]) -> tuple[Weights, DecoderConfig]:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf))
    save_file(tensors, folder / "model.safetensors")
    c = decoder_config(hf)
    return load_weights(open_checkpoint(str(folder)), c, "float32"), c


def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * weight


def published(h: np.ndarray, hf: dict, tensors: dict[str, np.ndarray], scale: float) -> np.ndarray:
    """Compute section 2.1 of the DeepSeek-V2 paper head by head, with keys and values made for each: [T, N * V].

    Rope rotates neighbours, or with rope_interleave false, as in transformers, half-split pairs.
    """
    w = {name.removeprefix("model.layers.0.self_attn.").removesuffix(".weight"): x for name, x in tensors.items()}
    nope, rope, value, rank = (hf[k] for k in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank"))
    angles = np.arange(len(h))[:, None] * hf["rope_theta"] ** (-np.arange(0, rope, 2) / rope)

    def rotate(x: np.ndarray) -> np.ndarray:
        if not hf.get("rope_interleave", True):
            x = np.stack(np.split(x, 2, -1), -1).reshape(x.shape)
        z = (x[:, 0::2] + 1j * x[:, 1::2]) * np.exp(1j * angles)
        return np.concatenate([z.real, z.imag], -1)  # in any one order: only products of q and k follow

    q = norm(h @ w["q_a_proj"].T, w["q_a_layernorm"]) @ w["q_b_proj"].T if hf["q_lora_rank"] else h @ w["q_proj"].T
    compressed, shared_key = np.split(h @ w["kv_a_proj_with_mqa"].T, [rank], -1)
    kv = norm(compressed, w["kv_a_layernorm"]) @ w["kv_b_proj"].T
    out = []
    for head in range(hf["num_attention_heads"]):
        q_head = q[:, head * (nope + rope) :][:, : nope + rope]
        kv_head = kv[:, head * (nope + value) :][:, : nope + value]
        scores = q_head[:, :nope] @ kv_head[:, :nope].T + rotate(q_head[:, nope:]) @ rotate(shared_key).T
        scores = np.where(np.tri(len(h), dtype=bool), scores * scale, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out.append(weights / weights.sum(-1, keepdims=True) @ kv_head[:, nope:])
    return np.concatenate(out, -1)


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None}, {"rope_interleave": False}], ids=str)
def test_the_absorbed_form_over_loaded_weights_is_the_published_formula(tmp_path: Path, changes: dict) -> None:
    hf = TINY | changes | {"num_nextn_predict_layers": 0}
    tensors = stored_tensors(hf)
    weights, c = load(tmp_path / "model", hf, tensors)
    h = np.random.default_rng(1).standard_normal((9, 24)).astype(np.float32)

    def attend(q, k, v, kv):
        assert v is None
        scores = jnp.einsum("tnr,skr->nts", q, k) * c.scale
        probabilities = jax.nn.softmax(jnp.where(np.tri(9, dtype=bool), scores, -jnp.inf), axis=-1)
        return jnp.einsum("nts,skc->tnc", probabilities, k[..., : c.value_dim]), kv

    rope = rope_table(jnp.arange(9), c.rope)
    with jax.default_matmul_precision("highest"):
        out, _ = latent_attention(jnp.asarray(h), jnp.zeros(()), weights.layers[0].mla, c.mla, rope, attend)
    expected = published(h.astype(np.float64), hf, {k: v.astype(np.float64) for k, v in tensors.items()}, c.scale)
    np.testing.assert_allclose(out, expected, atol=2e-4 * np.abs(expected).max())


def test_mtp_layers_are_left_out_where_the_config_has_them(tmp_path: Path) -> None:
    tensors = stored_tensors(TINY, extra_layers=1) | {"model.layers.2.eh_proj.weight": np.ones((24, 48), np.float32)}
    weights, _ = load(tmp_path / "model", TINY, tensors)
    assert len(weights.layers) == 2
    with pytest.raises(ModelError, match=r"model\.layers\.2\.eh_proj\.weight"):
        load(tmp_path / "model", TINY | {"num_nextn_predict_layers": 0}, tensors)


def test_a_tensor_of_two_weights_is_missed_or_misfits_once(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.kv_b_proj.weight"
    tensors = stored_tensors(TINY)
    with pytest.raises(ModelError) as caught:
        load(tmp_path / "model", TINY, tensors | {name: np.ones((26, 10), np.float32)})
    assert says(str(caught.value), f"shape … {name} … [26, 10] … [27, 10]")
    assert str(caught.value).count(name) == 1
    del tensors[name]
    with pytest.raises(ModelError) as caught:
        load(tmp_path / "model", TINY, tensors)
    assert str(caught.value).endswith(f"missing tensors: {name}")


def test_random_weights_have_norms_of_one() -> None:
    mla = random_weights(config(), "float32").layers[0].mla
    assert (np.asarray(mla.q_norm) == 1).all()
    assert (np.asarray(mla.kv_norm) == 1).all()
    assert 0.01 < np.asarray(mla.k_up).std() < 0.03
