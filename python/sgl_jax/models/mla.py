"""Multi-head latent attention in absorbed form: a token's latent vector is read as it is, never expanded to keys and
values of each head. The up-projection of the keys is applied to the queries, that of the values to the output.

Formulas: DeepSeek-V2 (https://arxiv.org/abs/2405.04434), section 2.1 and appendix C.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from sgl_jax.models.decoder_config import MlaConfig
from sgl_jax.models.linear import Linear, linear
from sgl_jax.models.weights import MlaWeights
from sgl_jax.ops.norm_rope import rms_norm, rotate

_EPS = 1e-6  # for the norms of compressed vectors; the model's own may differ


def latent_attention(
    h: Float[Array, "T D"],
    kv: Num[Array, "LP 1 1 page R"],
    w: MlaWeights[jax.Array],
    mla: MlaConfig,
    rope: Float[Array, "T rope"],
    attend: Callable[[jax.Array, jax.Array, None, jax.Array], tuple[jax.Array, jax.Array]],  # (q, k, v, kv) -> (o, kv)
    linear: Linear = linear,
) -> tuple[Float[Array, "T NV"], Num[Array, "LP 1 1 page R"]]:
    """Return the heads' outputs side by side, and the pool with this step's vectors. R = mla.latent_dim."""
    if w.q_norm is None:
        q = linear(h, w.q, site="mla.q")
    else:
        q = linear(rms_norm(linear(h, w.q_down, site="mla.q_down"), w.q_norm, _EPS), w.q_up, site="mla.q_up")
    q_nope, q_rope = jnp.split(q.reshape(len(h), -1, mla.head_dim), [mla.qk_nope_head_dim], axis=-1)
    latent, k_rope = jnp.split(linear(h, w.kv_down, site="mla.kv_down"), [mla.kv_lora_rank], axis=-1)
    k_up = w.k_up.astype(h.dtype).reshape(-1, mla.qk_nope_head_dim, mla.kv_lora_rank)
    v_up = w.v_up.astype(h.dtype).reshape(-1, mla.v_head_dim, mla.kv_lora_rank)

    q = jnp.concatenate([jnp.einsum("npc,tnp->tnc", k_up, q_nope), rotate(q_rope, rope)], axis=-1)
    k = jnp.concatenate([rms_norm(latent, w.kv_norm, _EPS)[:, None], rotate(k_rope[:, None], rope)], axis=-1)
    out, kv = attend(q, k, None, kv)  # [T, N, C]
    return jnp.einsum("nvc,tnc->tnv", v_up, out).reshape(len(h), -1), kv
