"""An EAGLE-3 head in training: its config, its first weights, its loss and its files, in the layout of SafeAILab/EAGLE."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rows import Rows, context, unrolled
from safetensors.numpy import save_file

from sgl_jax.models import draft_model
from sgl_jax.models.checkpoint import open_checkpoint
from sgl_jax.models.decoder_config import DecoderConfig
from sgl_jax.models.draft_checkpoint import draft_config
from sgl_jax.models.linear import linear
from sgl_jax.models.loader import random_weights
from sgl_jax.models.raw_config import RawConfig
from sgl_jax.models.weights import DraftWeights, Weights

LATER = 0.8  # weight of each pass, as a multiple of that of the pass before

type Head = DraftWeights[jax.Array]


def write_config(folder: Path, target: RawConfig, vocab_size: int) -> None:
    """Describe a head with one layer like the target's, whose features are normed one by one."""
    taken = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "rms_norm_eps")
    taken += ("rope_theta", "vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id")
    config = {"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "hidden_act": "silu"}
    config |= {key: target[key] for key in taken} | {"num_hidden_layers": 1, "tie_word_embeddings": False}
    config |= {"draft_vocab_size": vocab_size, "fc_norm": True, "torch_dtype": "bfloat16"}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def with_head(folder: Path, target: DecoderConfig) -> DecoderConfig:
    """Return the target with the head that the folder's config.json describes."""
    checkpoint = open_checkpoint(str(folder), load_format="dummy")
    return dataclasses.replace(target, draft=draft_config(checkpoint, target, "EAGLE3"))


def first_weights(weights: Weights[jax.Array], config: DecoderConfig, ids: np.ndarray, scale: float) -> Head:
    """Begin with the target: its last layer reads its late state, of root mean square `scale`, and its output head the
    result. The output head stays as it is."""
    head = random_weights(config, "float32").draft
    assert head is not None
    assert head.fc is not None
    f32 = functools.partial(jax.tree.map, lambda x: x.astype(jnp.float32))
    last, layer, d = weights.layers[-1], head.layers[0], config.hidden_size
    kept = {name: f32(getattr(last, name)) for name in ("o", "mlp_norm", "gate_up", "down")}
    layer = dataclasses.replace(layer, qkv=layer.qkv.at[:, d:].set(f32(last.qkv)), **kept)
    return dataclasses.replace(
        head,
        fc=scale * (0.1 * head.fc + jnp.eye(*head.fc.shape, k=2 * d)),
        feature_norm=f32(last.attn_norm),
        layers=[layer],
        final_norm=f32(weights.final_norm),
        lm_head=f32(weights.embed if weights.lm_head is None else weights.lm_head)[ids],
        d2t=jnp.asarray(ids - np.arange(len(ids)), jnp.int32),
    )


def loss(
    head: Head,
    weights: Weights[jax.Array],
    config: DecoderConfig,
    rows: Rows,
    tapped: jax.Array,
    final: jax.Array,
    passes: int,
) -> tuple[jax.Array, jax.Array]:
    """Return the loss of a chain of drafts from every token, and how many chains are right up to each pass, [passes + 1]:
    the last is the number of chains.

    `tapped` are the target's states, [rows, ROW, 3, D], and `final` its output after the final norm. Only tokens that an
    answer follows count.
    """
    draft, dtype, tokens = config.draft, final.dtype, rows.tokens.reshape(-1)
    assert draft is not None
    weights = dataclasses.replace(weights, draft=jax.tree.map(lambda x: x.astype(dtype), head))
    (at,) = jnp.nonzero(rows.answers.reshape(-1), size=len(tokens) * 3 // 4, fill_value=len(tokens))
    counts_at, position = at < len(tokens), rows.position.reshape(-1)[at]
    wanted = linear(
        final.reshape(len(tokens), -1)[at], head.lm_head.astype(dtype), site="lm_head", out_dtype=jnp.float32
    )
    wanted, best = jax.nn.softmax(wanted), wanted.argmax(-1)
    counts_at &= (best + head.d2t[best]) == jnp.roll(tokens, -1)[at]  # the best of all ids can be drafted
    states = [*tapped.reshape(len(tokens), -1, config.hidden_size).swapaxes(0, 1)]
    feature = rows.before(draft_model.features(weights, config, states[0], states, linear))
    total, kv, right = jnp.float32(0), (), rows.answers.reshape(-1)
    chains = [right.sum()]
    for number in range(passes):
        around = context(rows, config, dtype.name, unrolled(rows, draft.decoder, number))
        out, kv = draft_model.forward(weights, config, tokens, feature, kv, around, 0)
        scores = draft_model.logits(weights, config, out[at], linear)
        counts = counts_at & (position > number)
        cross = jax.nn.logsumexp(scores, axis=-1) - (wanted * scores).sum(-1)
        total += LATER**number * (cross * counts).sum() / counts.sum()
        hit = jnp.zeros(len(tokens), bool).at[at].set((scores.argmax(-1) == best) & counts, mode="drop")
        right = (jnp.roll(right, 1) if number else right) & hit
        chains.insert(-1, right.sum())
        feature = rows.before(draft_model.recycled(weights, config, out))
    return total, jnp.stack(chains)


def save(head: Head, folder: Path, config: DecoderConfig) -> None:
    """Write the weights beside config.json."""
    assert config.draft is not None
    own, (layer,) = config.draft.decoder, head.layers
    q, k, v = np.split(layer.qkv, np.cumsum([own.num_heads, own.num_kv_heads]) * own.head_dim)
    gate, up = np.split(layer.gate_up, 2)
    tensors = {
        "midlayer.self_attn.q_proj.weight": q,
        "midlayer.self_attn.k_proj.weight": k,
        "midlayer.self_attn.v_proj.weight": v,
        "midlayer.self_attn.o_proj.weight": layer.o,
        "midlayer.mlp.gate_proj.weight": gate,
        "midlayer.mlp.up_proj.weight": up,
        "midlayer.mlp.down_proj.weight": layer.down,
        "midlayer.input_layernorm.weight": layer.attn_norm,
        "midlayer.hidden_norm.weight": head.feature_norm,
        "midlayer.post_attention_layernorm.weight": layer.mlp_norm,
        "fc.weight": head.fc,
        "norm.weight": head.final_norm,
        "lm_head.weight": head.lm_head,
    } | {f"fc_norm.{i}.weight": norm for i, norm in enumerate(head.fc_norms)}
    stored = {name: np.asarray(jnp.asarray(x, jnp.bfloat16)) for name, x in tensors.items()}
    offsets = np.asarray(head.d2t).astype(np.int64)
    is_drafted = np.isin(np.arange(config.vocab_size), offsets + np.arange(len(offsets)))
    save_file(stored | {"d2t": offsets, "t2d": is_drafted}, folder / "model.safetensors")
