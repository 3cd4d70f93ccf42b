"""Frequencies equal the formulas, computed here in float64 with other code."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sgl_jax.models.families import decoder_config
from sgl_jax.models.model_errors import ModelError
from sgl_jax.models.rope import context_length, longer_context, resolve_rope

SIZES = {"vocab_size": 100, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


def plain(theta: float, dim: int) -> list[float]:
    return [theta ** (-2 * i / dim) for i in range(dim // 2)]


def close(actual: tuple[float, ...], expected: list[float]) -> None:
    np.testing.assert_allclose(actual, expected, rtol=3e-6)


def test_default():
    rope = resolve_rope({"rope_theta": 1e6, "rope_scaling": None}, 64)
    close(rope.inv_freq, plain(1e6, 64))
    assert rope.attention_factor == 1.0


def test_theta_defaults_to_ten_thousand():
    close(resolve_rope({}, 16).inv_freq, plain(1e4, 16))


def test_dynamic_is_plain_up_to_the_length_where_contexts_end():
    config = {"max_position_embeddings": 64, "rope_scaling": {"type": "dynamic", "factor": 4.0}}
    assert resolve_rope(config, 32).inv_freq == resolve_rope({}, 32).inv_freq
    assert context_length(config) == 64


def test_linear_divides_every_frequency():
    close(
        resolve_rope({"rope_scaling": {"type": "linear", "factor": 4.0}}, 32).inv_freq, [f / 4 for f in plain(1e4, 32)]
    )


def test_partial_rotary_factor_shortens_the_rotation():
    close(resolve_rope({"partial_rotary_factor": 0.5}, 64).inv_freq, plain(1e4, 32))


def test_new_and_old_spelling_mean_the_same():
    old = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    new = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}}
    assert resolve_rope(old, 32) == resolve_rope(new, 32)


def test_llama3():
    scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    hf = {"rope_theta": 5e5, "rope_scaling": scaling | {"original_max_position_embeddings": 64}}
    expected = []
    for freq in plain(5e5, 64):
        turns = 64 * freq / (2 * math.pi)  # within the original context
        if turns > 4:
            expected.append(freq)
        elif turns < 1:
            expected.append(freq / 32)
        else:
            share = (turns - 1) / 3
            expected.append(share * freq + (1 - share) * freq / 32)
    assert len({e / f for e, f in zip(expected, plain(5e5, 64), strict=True)}) > 2  # all three cases occur
    close(resolve_rope(hf, 64).inv_freq, expected)


LONGROPE = {
    "max_position_embeddings": 512,
    "original_max_position_embeddings": 128,
    "rope_scaling": {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.5, 2.0, 3.0],
        "long_factor": [1.0, 4.0, 9.0, 16.0],
    },
}


def test_longrope_takes_the_short_factors_up_to_the_original_length_and_the_long_ones_beyond():
    rope, longer = resolve_rope(LONGROPE, 8), longer_context(LONGROPE, 8)
    close(rope.inv_freq, [f / s for f, s in zip(plain(1e4, 8), (1, 1.5, 2, 3), strict=True)])
    assert rope.attention_factor == pytest.approx(math.sqrt(1 + math.log(4) / math.log(128)))
    assert context_length(LONGROPE) == 128
    assert longer is not None
    assert (longer.length, longer.rope.attention_factor) == (512, rope.attention_factor)
    close(longer.rope.inv_freq, [f / s for f, s in zip(plain(1e4, 8), (1, 4, 9, 16), strict=True)])


@pytest.mark.parametrize("original", [512, 1024, None])
def test_longrope_without_a_longer_context_is_the_short_factors(original):
    """Without an original length it is max_position_embeddings."""
    config = LONGROPE | {"original_max_position_embeddings": original}
    assert longer_context(config, 8) is None
    assert context_length(config) == 512
    assert resolve_rope(config, 8).attention_factor == 1.0


def test_the_length_of_a_launch_decides_the_factors():
    config = decoder_config({"architectures": ["Phi3ForCausalLM"], **SIZES, **LONGROPE})
    assert config.for_context(None) is config.for_context(128) is config
    assert config.longer is not None
    for length in (129, 512):
        longer = config.for_context(length)
        assert (longer.context_length, longer.rope, longer.longer) == (512, config.longer.rope, None)
    old = LONGROPE["rope_scaling"] | {"type": "su", "rope_type": None}
    assert decoder_config({"architectures": ["Phi3ForCausalLM"], **SIZES, **LONGROPE, "rope_scaling": old}) == config


def test_longrope_needs_a_factor_for_each_frequency():
    with pytest.raises(ModelError, match=r"short_factor has 4 entries; .* 16 values needs 8"):
        resolve_rope(LONGROPE, 16)


def test_yarn():
    hf = {
        "max_position_embeddings": 256,
        "rope_scaling": {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32},
    }
    dim = 64
    bounds = [dim * math.log(32 / (turns * 2 * math.pi)) / (2 * math.log(1e4)) for turns in (32, 1)]
    low, high = max(math.floor(bounds[0]), 0), math.ceil(bounds[1])
    expected = []
    for i, freq in enumerate(plain(1e4, dim)):
        interpolated = min(max((i - low) / (high - low), 0), 1)
        expected.append(freq / 8 * interpolated + freq * (1 - interpolated))
    rope = resolve_rope(hf, dim)
    close(rope.inv_freq, expected)
    assert rope.attention_factor == pytest.approx(0.1 * math.log(8) + 1)


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({"attention_factor": 1.5}, 1.5),
        ({"mscale": 0.7, "mscale_all_dim": 1.2}, (0.07 * math.log(8) + 1) / (0.12 * math.log(8) + 1)),
        ({"mscale": 1.0, "mscale_all_dim": 0}, 0.1 * math.log(8) + 1),
    ],
)
def test_yarn_attention_factor(extra, expected):
    scaling = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, **extra}
    hf = {"max_position_embeddings": 256, "rope_scaling": scaling}
    assert resolve_rope(hf, 64).attention_factor == pytest.approx(expected)


def test_yarn_without_truncation_uses_unrounded_bounds():
    scaling = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096}
    hf = {"max_position_embeddings": 32768, "rope_scaling": scaling}
    rounded = resolve_rope(hf, 64).inv_freq
    unrounded = resolve_rope({**hf, "rope_scaling": scaling | {"truncate": False}}, 64).inv_freq
    assert rounded != unrounded
    bounds = [64 * math.log(4096 / (turns * 2 * math.pi)) / (2 * math.log(1e4)) for turns in (32, 1)]
    share = [min(max((i - bounds[0]) / (bounds[1] - bounds[0]), 0), 1) for i in range(32)]
    close(unrounded, [f / 8 * s + f * (1 - s) for f, s in zip(plain(1e4, 64), share, strict=True)])


def test_gguf_factors_divide_one_frequency_each():
    hf = {"rope_scaling": {"rope_type": "gguf_factors", "factors": [1.0, 2.0, 4.0, 8.0]}}
    close(resolve_rope(hf, 8).inv_freq, [f / d for f, d in zip(plain(1e4, 8), (1, 2, 4, 8), strict=True)])


@pytest.mark.parametrize(
    ("scaling", "named"),
    [
        ({"rope_type": "longrope", "factor": 2.0}, "'longrope'"),
        ({"rope_type": "longrope"}, "'longrope'"),
        ({"rope_type": "default", "mrope_section": [16, 24, 24]}, "mrope_section"),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 3}, "beta_fast"),
        ({"rope_type": "llama3", "factor": 2.0}, "low_freq_factor, high_freq_factor"),
        ({"full_attention": {"rope_type": "default"}, "sliding_attention": {}}, "full_attention, sliding_attention"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(scaling, named):
    with pytest.raises(ModelError, match=named):
        resolve_rope({"rope_scaling": scaling}, 64)


@pytest.mark.parametrize(
    ("hf", "expected"),
    [
        ({"max_position_embeddings": 4096}, 4096),
        ({"max_position_embeddings": 16384, "rope_scaling": {"type": "linear", "factor": 4.0}}, 16384),
        (  # as Qwen 2.5 tells its users to write it
            {
                "max_position_embeddings": 32768,
                "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            },
            131072,
        ),
        (
            {
                "max_position_embeddings": 256,
                "rope_scaling": {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32},
            },
            256,
        ),
    ],
)
def test_context_length(hf, expected):
    assert context_length(hf) == expected
