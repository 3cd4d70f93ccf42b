"""Mixtral: Mistral with experts in place of every MLP."""

from sgl_jax.models import llama
from sgl_jax.models.decoder_config import DecoderConfig, MoeConfig
from sgl_jax.models.hf_config import decoder, required, uniform_windows
from sgl_jax.models.raw_config import RawConfig

ARCHITECTURES = ("MixtralForCausalLM",)
_DENSE = {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "max_position_embeddings": 131072}
DEFAULTS = {"MixtralForCausalLM": _DENSE | {"num_local_experts": 8, "num_experts_per_tok": 2}}
MOE = llama.LAYER + "block_sparse_moe."
EXPERT = MOE + "experts.{e}."
NAMES = llama.NAMES.with_layer(
    {
        "moe.router": (MOE + "gate.weight",),
        "moe.experts.gate_up": (EXPERT + "w1.weight", EXPERT + "w3.weight"),
        "moe.experts.down": (EXPERT + "w2.weight",),
    }
)


def config(hf: RawConfig) -> DecoderConfig:
    moe = MoeConfig(
        num_experts=required(hf, "num_local_experts"),
        experts_per_token=required(hf, "num_experts_per_tok"),
        intermediate_size=required(hf, "intermediate_size"),
    )
    return decoder(hf, sliding_windows=uniform_windows(hf), moe=moe)
