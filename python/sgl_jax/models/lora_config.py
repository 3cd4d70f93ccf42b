"""Reads the adapter_config.json of a LoRA adapter: which modules it changes, and the rank and scale of each.

Source: PEFT 0.21: tuners/lora/config.py, check_target_module_exists, get_pattern_key.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated

import msgspec

from sgl_jax.models.config_fields import checked_fields
from sgl_jax.models.folder_files import JsonFile
from sgl_jax.models.model_errors import ModelError, faults_named

CONFIG_FILE = "adapter_config.json"
_REQUIRED = ("r", "lora_alpha", "target_modules")
# How an adapter was trained, and options of keys that are refused.
_WITHOUT_EFFECT = (
    "peft_type peft_version task_type inference_mode auto_mapping revision lora_dropout megatron_config megatron_core "
    "loftq_config eva_config corda_config lora_ga_config runtime_config qalora_group_size ensure_weight_tying merge_weights "
    "unsloth_fixed lora_dtype lorap_lr_ratio"
)
# Values of other keys that leave an adapter two factors beside each matrix of an unchanged base, as empty values do.
_HARMLESS = {"bias": ("none",), "init_lora_weights": (True, "gaussian", "orthogonal", "eva", "mica")}
# Limits of expressions, with which matching a module's path ends soon, whatever the expression is.
_LONGEST_PATTERN, _MOST_UNBOUNDED = 4096, 6
_UNBOUNDED, _NESTED = re.compile(r"(?<!\\)[*+]|\{\d+,\}"), re.compile(r"(?<!\\)\)([*+]|\{\d*,\})")
_Rank = Annotated[int, msgspec.Meta(ge=1, le=2**16)]
_Alpha = Annotated[float, msgspec.Meta(gt=-1e30, lt=1e30)]


class LoraConfig(msgspec.Struct, frozen=True):
    """Keys of adapter_config.json that are applied. A module is given by its path in the model."""

    r: _Rank
    lora_alpha: _Alpha
    target_modules: list[str] | str
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, _Rank] | None = None
    alpha_pattern: dict[str, _Alpha] | None = None
    use_rslora: bool | None = None
    base_model_name_or_path: str | None = None

    def targets(self, module: str) -> bool:
        """Return whether the adapter has factors for a linear module."""
        targets, layers = self.target_modules, self.layers_to_transform
        takes_all = isinstance(targets, str) and targets.lower() == "all-linear"
        if _names("exclude_modules", self.exclude_modules or [], module):
            return False
        if not takes_all and not _names("target_modules", targets, module):
            return False
        if layers in (None, []) or module in targets:
            return True
        return self._layer(module) in (layers if isinstance(layers, list) else [layers])

    def _layer(self, module: str) -> int | None:
        patterns = self.layers_pattern or "[^.]*"
        patterns = [patterns] if isinstance(patterns, str) else patterns
        numbered = (rf"(?:^|.*?\.){pattern}\.(?P<layer>\d{{1,9}})\." for pattern in patterns)
        number = next(filter(None, (_match("layers_pattern", pattern, module) for pattern in numbered)), None)
        return int(number["layer"]) if number else None

    def rank(self, module: str) -> int:
        return _of_pattern("rank_pattern", self.rank_pattern, module, self.r)

    def scale(self, module: str) -> float:
        rank = self.rank(module)
        alpha = _of_pattern("alpha_pattern", self.alpha_pattern, module, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def read_lora_config(folder: Path) -> LoraConfig:
    """Read an adapter's config. Raises ModelError for one that asks for more than LoRA on linear modules."""
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise ModelError(f"{folder} has no {CONFIG_FILE}; an adapter is a folder as PEFT's save_pretrained writes it")
    raw = JsonFile(file).fields
    if raw.get("peft_type") != "LORA":
        raise ModelError(f"{file} has peft_type {raw.get('peft_type')!r:.80}; only LORA is served")
    if missing := [key for key in _REQUIRED if raw.get(key) is None]:
        raise ModelError(f"{file} has no {' and no '.join(missing)}; PEFT writes {', '.join(_REQUIRED)}")
    if refused := [*_refused(raw)]:
        served = "only two factors beside each linear module of an unchanged base are served"
        raise ModelError(f"{file} has {', '.join(refused)}; {served}")
    config = checked_fields(raw, LoraConfig, file=file)
    if isinstance(config.target_modules, str) and config.layers_to_transform is not None:
        raise ModelError(
            f"{file} has layers_to_transform; target_modules {config.target_modules!r:.80} must be a list then"
        )
    return config


def _refused(raw: Mapping[str, object]) -> Iterator[str]:
    """Yield each key, with its value, that could change what the adapter computes."""
    read = {*LoraConfig.__struct_fields__, *_WITHOUT_EFFECT.split()}
    for key, value in raw.items():
        if value and key not in read and value not in _HARMLESS.get(key, ()):
            yield f"{key} {value!r:.80}"


def _names(key: str, names: list[str] | str, module: str) -> bool:
    """Return whether a list of paths or their ends, or one regular expression, stands for a module."""
    if isinstance(names, str):
        return _match(key, names, module, re.fullmatch) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _of_pattern[T](key: str, patterns: Mapping[str, T] | None, module: str, default: T) -> T:
    """Return the value of the first pattern that matches the end of a module's path."""
    found = (value for pattern, value in (patterns or {}).items() if _match(key, rf"(.*\.)?({pattern})$", module))
    return next(found, default)


def _match(
    key: str, pattern: str, module: str, how: Callable[[str, str], re.Match[str] | None] = re.match
) -> re.Match[str] | None:
    if len(pattern) > _LONGEST_PATTERN or len(_UNBOUNDED.findall(pattern)) > _MOST_UNBOUNDED or _NESTED.search(pattern):
        rule = f"at most {_MOST_UNBOUNDED} of * and +, none behind a group, and {_LONGEST_PATTERN} characters"
        raise ModelError(
            f"{CONFIG_FILE}: {key} has {pattern!r:.200}; an expression may have {rule}: it could take forever"
        )
    with faults_named(CONFIG_FILE, f"{key} has {pattern!r:.200}, which is no regular expression"):
        return how(pattern, module)
