"""Finds the format of a checkpoint's quantised matrices by its config.json."""

from collections.abc import Callable, Mapping

from sgl_jax.models.formats.compressed_tensors import compressed_tensors
from sgl_jax.models.formats.floats import fp8, modelopt, mxfp4
from sgl_jax.models.formats.integers import awq, gptq
from sgl_jax.models.model_errors import ModelError
from sgl_jax.models.quantised import WeightFormat
from sgl_jax.models.raw_config import RawConfig

# By quant_method, as --quantization may repeat it.
METHODS: Mapping[str, Callable[[RawConfig], WeightFormat]] = {
    "awq": awq,
    "compressed-tensors": compressed_tensors,
    "fbgemm_fp8": fp8,
    "fp8": fp8,
    "gptq": gptq,
    "modelopt": modelopt,
    "mxfp4": mxfp4,
}


def weight_format(hf: RawConfig) -> WeightFormat | None:
    """Return the format that a config.json describes, None for plain floats. Raises ModelError for one that is not read."""
    if not (said := quantization_config(hf)):
        return None
    if (method := method_of(hf)) not in METHODS:
        found = f"quant_method {method!r}" if method else f"no quant_method, but {', '.join(map(str, said))}"
        raise ModelError(f"config.json: quantization_config has {found}; checkpoints of {', '.join(METHODS)} are read")
    return METHODS[method](said)


def method_of(hf: RawConfig) -> str | None:
    """Return the quant_method of a config.json, which ModelOpt's may lack."""
    said = quantization_config(hf)
    return said.get("quant_method") or ("modelopt" if "quant_algo" in said else None)


def quantization_config(hf: RawConfig) -> RawConfig:
    """Return what a config.json says of its quantised matrices, under either of its names; empty: nothing."""
    return RawConfig(hf.get("quantization_config") or hf.get("compression_config") or {})
