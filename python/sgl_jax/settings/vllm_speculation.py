"""Translation of vLLM's --speculative-config into the flags of speculative decoding."""

import json

from sgl_jax.settings.flag_parser import FlagError, option_named, refuse
from sgl_jax.settings.flags import flags_of, mistakes_in
from sgl_jax.settings.speculative_flags import SpeculativeFlags

_METHODS = {"ngram": "NGRAM", "eagle": "EAGLE", "eagle3": "EAGLE3", "mtp": "NEXTN", "draft_model": "STANDALONE"}
_FLAGS = {
    "method": "speculative_algorithm",
    "model": "speculative_draft_model_path",
    "num_speculative_tokens": "speculative_num_steps",
    "prompt_lookup_min": "speculative_ngram_min_match_window_size",
    "prompt_lookup_max": "speculative_ngram_max_match_window_size",
    "disable_by_batch_size": "speculative_disable_by_batch_size",
}
_SHARDS = "draft_tensor_parallel_size"


def translated(text: str, tp_size: int) -> SpeculativeFlags:
    """Return the flags that vLLM's JSON stands for. Keys with null count as not given. Raises FlagError, which names flags
    or keys."""
    try:
        config = json.loads(text)
    except ValueError:
        config = None
    if not isinstance(config, dict):
        example = '{"method": "ngram", "num_speculative_tokens": 4}'
        raise FlagError("", f"{text} is no JSON object; write it as {example}")
    given = {key: value for key, value in config.items() if value is not None}
    if (shards := given.pop(_SHARDS, tp_size)) != tp_size:
        raise FlagError("", f"{_SHARDS} is {shards}; it must be --tp-size, {tp_size}: both models are divided alike")
    if unknown := given.keys() - _FLAGS.keys():
        taken = ", ".join([*_FLAGS, _SHARDS])
        raise FlagError(
            "", f"{', '.join(sorted(unknown))} cannot be honoured, leave it out; the keys taken are {taken}"
        )
    method = str(given.get("method"))
    family = "mtp" if method.endswith("_mtp") else method.removesuffix("_gpu")  # deepseek_mtp, ngram_gpu and the like
    if family not in _METHODS:
        raise FlagError("", f"method is {method}; it must be one of {', '.join(_METHODS)}")
    values = {_FLAGS[key]: value for key, value in given.items()} | {"speculative_algorithm": _METHODS[family]}
    refuse(mistakes_in(flags_of(SpeculativeFlags), values, lambda name: ""))
    return SpeculativeFlags(**values)


def in_vllm_words(message: str) -> str:
    """Name the keys of the JSON in place of the flags that they stand for."""
    for key, name in _FLAGS.items():
        message = message.replace(option_named(name), key)
    return message
