"""Declared weights add up to the known numbers of parameters."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from sgl_jax.models.families import decoder_config
from sgl_jax.models.weights import parameters_per_token

SMOLLM2_135M = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}


def test_parameters_a_token_is_multiplied_with(stories260k: Path) -> None:
    # D = 64, F = 172, N = 8, K = 4, H = 8, L = 5, V = 512
    layer = (8 + 4 + 4) * 8 * 64 + 64 * 64 + 3 * 64 * 172
    stories = decoder_config(json.loads((stories260k / "config.json").read_text()))
    assert parameters_per_token(stories) == 5 * layer + 512 * 64 == 259_328
    # D = 576, F = 1536, N = 9, K = 3, H = 64, L = 30, V = 49152
    layer = (9 + 3 + 3) * 64 * 576 + 576 * 576 + 3 * 576 * 1536
    smollm2 = decoder_config(SMOLLM2_135M)
    assert parameters_per_token(smollm2) == 30 * layer + 49152 * 576 == 134_479_872
    assert parameters_per_token(dataclasses.replace(smollm2, tie_embeddings=False)) == 134_479_872
