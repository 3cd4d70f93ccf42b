"""Rotary embedding parameters of a config.json, resolved to frequencies.

Formulas: transformers 5, `modeling_rope_utils.py` (default, linear, llama3, yarn, longrope). The arithmetic is float32 in the
same order as there: an exponent rounded otherwise moves a frequency by 1e-6 of itself, which long contexts can see.
"gguf_factors" is ours: a GGUF file stores llama3 scaling as one divisor per frequency (tensor rope_freqs.weight).
"""

import math
from typing import Any

import numpy as np

from sgl_jax.models.decoder_config import LongerContext, RopeConfig
from sgl_jax.models.model_errors import ModelError
from sgl_jax.models.raw_config import RawConfig, replaced

_COMMON_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_STRETCH = ("original_max_position_embeddings", "factor", "attention_factor", "beta_fast", "beta_slow")
# By rope type, the keys it needs and those it may have besides. Any other key would be ignored, so it is refused.
_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ("original_max_position_embeddings",)),
    "yarn": ((), (*_STRETCH, "mscale", "mscale_all_dim", "truncate", "finetuned")),
    "longrope": (("short_factor", "long_factor"), ("original_max_position_embeddings", "factor", "attention_factor")),
    "gguf_factors": (("factors",), ()),
}


def rope_parameters(hf: RawConfig) -> dict[str, Any]:
    """Return the rope settings: transformers 5 writes `rope_parameters`, older ones `rope_scaling` beside `rope_theta`.

    Raises ModelError for types and keys that are not served.
    """
    scaling = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    nested = [k for k, v in scaling.items() if isinstance(v, dict)]
    if nested:
        raise ModelError(
            f"config.json gives rope_parameters for each kind of layer ({', '.join(nested)}); "
            "this architecture is served with one rope for all layers"
        )
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in _KEYS:
        served = ", ".join(k for k in _KEYS if k != "gguf_factors")
        raise ModelError(f"config.json asks for rope type {kind!r}; supported are {served}")
    needed, optional = _KEYS[kind]
    known = {*needed, *optional, *_COMMON_KEYS}
    unknown = sorted(k for k, v in scaling.items() if k not in known and v is not None)
    if unknown:
        raise ModelError(
            f"config.json sets {', '.join(f'{k}={scaling[k]!r}' for k in unknown)} for rope type {kind!r}, "
            f"which is not supported; supported are {', '.join(sorted(known))}"
        )
    if missing := [k for k in needed if scaling.get(k) is None]:
        raise ModelError(f"config.json asks for rope type {kind!r} without {', '.join(missing)}")
    scaling["rope_type"] = kind
    for key, default in (("rope_theta", 10000.0), ("partial_rotary_factor", 1.0)):
        if scaling.get(key) is None:
            scaling[key] = default if hf.get(key) is None else hf[key]
    if kind in ("llama3", "yarn", "longrope") and hf.get("original_max_position_embeddings") is not None:
        scaling["original_max_position_embeddings"] = hf["original_max_position_embeddings"]
    return scaling


def resolve_rope(hf: RawConfig, head_dim: int) -> RopeConfig:
    """Return the frequencies for heads of this size. Raises ModelError for settings that are not served."""
    p = rope_parameters(hf)
    dim = int(head_dim * p["partial_rotary_factor"])
    if dim < 2 or dim % 2:
        raise ModelError(
            f"config.json: rope rotates {dim} of a head's {head_dim} values (partial_rotary_factor "
            f"{p['partial_rotary_factor']}); it must be an even number of at least 2"
        )
    plain, factor = np.float32(1) / _periods(p["rope_theta"], dim), 1.0
    match p["rope_type"]:
        case "default" | "dynamic":  # dynamic is plain up to max_position_embeddings, where contexts end
            inv_freq = plain
        case "linear":
            inv_freq = plain / np.float32(p["factor"])
        case "llama3":
            inv_freq = _llama3(p, plain, hf)
        case "longrope":
            inv_freq, factor = _longrope(p, dim, hf)
        case "gguf_factors":
            if (shape := np.shape(p["factors"])) != (dim // 2,):
                raise ModelError(f"rope_freqs.weight has shape {shape}; a rotation of {dim} values needs ({dim // 2},)")
            inv_freq = plain / np.asarray(p["factors"], np.float32)
        case _:
            inv_freq, factor = _yarn(p, dim, hf)
    return RopeConfig(tuple(float(x) for x in inv_freq), factor)


def context_length(hf: RawConfig) -> int:
    """Return the model's longest context, in tokens.

    YaRN configs differ in whether max_position_embeddings is already the stretched length, so the larger reading is
    taken; longrope takes other factors beyond the original length (see longer_context); the other types store the
    stretched length.
    """
    p, limit = rope_parameters(hf), int(hf["max_position_embeddings"])
    if p["rope_type"] == "longrope":
        return min(limit, _original_length(p, hf))
    if p["rope_type"] == "yarn" and p.get("factor"):
        return max(limit, int(_original_length(p, hf) * p["factor"]))
    return limit


def _original_length(p: dict[str, Any], hf: RawConfig) -> int:
    return p.get("original_max_position_embeddings") or hf["max_position_embeddings"]


def _periods(base: float, dim: int) -> np.ndarray:
    exponents = np.arange(0, dim, 2).astype(np.float32) / np.float32(dim)
    return np.power(np.float32(base), exponents)


def _llama3(p: dict[str, Any], inv_freq: np.ndarray, hf: RawConfig) -> np.ndarray:
    """Divide low frequencies by factor, keep high ones, and blend linearly in between."""
    factor, low, high = (np.float32(p[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    original = np.float32(_original_length(p, hf))
    wavelength = np.float32(2 * math.pi) / inv_freq
    smooth = (original / wavelength - low) / (high - low)
    blended = (1 - smooth) * inv_freq / factor + smooth * inv_freq
    long, short = wavelength > original / low, wavelength < original / high
    return np.where(long, inv_freq / factor, np.where(short, inv_freq, blended))


def _yarn(p: dict[str, Any], dim: int, hf: RawConfig) -> tuple[np.ndarray, float]:
    """Keep the frequency of dimensions that turn often and interpolate slow ones (https://arxiv.org/abs/2309.00071).

    Returns inverse frequencies, float32[dim / 2], and the factor of cos and sin.
    """
    original, factor, base = _original_length(p, hf), _yarn_factor(p, hf), p["rope_theta"]

    def dimension(num_rotations: float) -> float:
        return dim * math.log(original / (num_rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension(p.get("beta_fast") or 32), dimension(p.get("beta_slow") or 1)
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    span = np.float32(high - low if high != low else 0.001)
    interpolated = np.clip((np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / span, 0, 1)

    periods = _periods(base, dim)
    kept = 1 - interpolated
    inv_freq = np.float32(1) / (np.float32(factor) * periods) * (1 - kept) + np.float32(1) / periods * kept
    if p.get("attention_factor") is not None:
        return inv_freq, float(p["attention_factor"])
    if p.get("mscale") and p.get("mscale_all_dim"):
        return inv_freq, _mscale(factor, p["mscale"]) / _mscale(factor, p["mscale_all_dim"])
    return inv_freq, _mscale(factor, 1)


def _longrope(p: dict[str, Any], dim: int, hf: RawConfig) -> tuple[np.ndarray, float]:
    """Divide each frequency by its short factor (https://arxiv.org/abs/2402.13753).

    Returns inverse frequencies, float32[dim / 2], and the factor of cos and sin.
    """
    for key in ("short_factor", "long_factor"):
        if (number := len(p[key])) != dim // 2:
            raise ModelError(f"config.json: {key} has {number} entries; a rotation of {dim} values needs {dim // 2}")
    original = _original_length(p, hf)
    factor = p.get("factor") or hf["max_position_embeddings"] / original
    inv_freq = np.float32(1) / (np.asarray(p["short_factor"], np.float32) * _periods(p["rope_theta"], dim))
    if p.get("attention_factor") is not None:
        return inv_freq, float(p["attention_factor"])
    return inv_freq, 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def longer_context(hf: RawConfig, head_dim: int) -> LongerContext | None:
    """Return length and rope of contexts beyond the original length of longrope: they take the long factors.

    transformers takes the long factors for a sequence once it is longer, and computes its KV anew. No sequence could
    share its KV with another then, so a server has to be one or the other.
    """
    p = rope_parameters(hf)
    if p["rope_type"] != "longrope" or _original_length(p, hf) >= hf["max_position_embeddings"]:
        return None
    long = replaced(hf, {"rope_parameters": p | {"short_factor": p["long_factor"]}})
    return LongerContext(int(hf["max_position_embeddings"]), resolve_rope(long, head_dim))


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def yarn_score_scale(hf: RawConfig) -> float:
    """Return DeepSeek's factor of attention scores, beside the scale on cos and sin; 1 without mscale_all_dim."""
    p = rope_parameters(hf)
    if p["rope_type"] != "yarn" or not p.get("mscale_all_dim"):
        return 1.0
    return _mscale(_yarn_factor(p, hf), p["mscale_all_dim"]) ** 2


def _yarn_factor(p: dict[str, Any], hf: RawConfig) -> float:
    return p.get("factor") or hf["max_position_embeddings"] / _original_length(p, hf)
