"""Opens LoRA adapters: a folder with adapter_config.json and adapter_model.safetensors, as PEFT writes them.

An adapter adds s (x Aᵀ) Bᵀ to the product of x with a matrix (https://arxiv.org/abs/2106.09685). Each tensor of the file
must have its place in the model, and each module that the config names its tensors: an adapter that is applied in part
gives a text that nobody trained.
"""

from __future__ import annotations

import re
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from sgl_jax.models.adapters import ADAPTED_SITES
from sgl_jax.models.decoder_config import DecoderConfig
from sgl_jax.models.folder_files import reading
from sgl_jax.models.lora_config import CONFIG_FILE, LoraConfig, read_lora_config
from sgl_jax.models.model_errors import ModelError
from sgl_jax.models.names import TensorNames
from sgl_jax.models.plan import listed, stored_parts
from sgl_jax.models.safetensors_file import read_safetensors
from sgl_jax.models.spec import Site
from sgl_jax.models.stored import StoredTensor
from sgl_jax.models.stored_names import common_module
from sgl_jax.models.weights import declare_plain, site_of

_WEIGHTS_FILE, _PICKLE = "adapter_model.safetensors", "adapter_model.bin"
# Prefixes of the text model's modules besides the family's own: without a head, and inside a larger model. They are not
# read off the file, as those of a vision part can end like the text model's.
_PREFIXES = ("", "model.language_model.", "language_model.model.", "language_model.", "model.text_model.")
_LARGEST = 1e4  # a limit for values: products stay far from overflow, which would spoil KV that other requests share
_NOT_APPLIED = "tensors that are not applied, as only A and B of attention and of dense MLPs are"


class MatrixFactors(NamedTuple):
    """Factors of a matrix that consists of parts (q, k and v; gate and up) or of one; None for a part that stays as it is."""

    a: tuple[np.ndarray | None, ...]  # f32[r, I]
    b: tuple[np.ndarray | None, ...]  # f32[O, r], times the scale


class _Module(NamedTuple):
    """Linear module of the checkpoint that holds a weight or some of its parts."""

    weight: str  # path in the tree: ".layers[3].qkv"
    site: Site
    num_parts: int  # parts of the whole weight
    first: int  # number of the first part that it holds
    sizes: tuple[int, ...]  # output rows of each part that it holds
    shape: tuple[int, ...]  # [O, I], as it is stored
    order: np.ndarray | slice  # stored rows, in the weight's order


class _Pair(NamedTuple):
    module: _Module
    a: StoredTensor
    b: StoredTensor
    scale: float


@dataclass(frozen=True)
class AdapterFiles:
    """Adapter whose files fit the model. Their values are read by `factors`."""

    path: Path
    base_model: str  # name or path of the model that it was trained with; may be empty
    fingerprint: str  # another one after a change of the files
    checksum: int  # made of their bytes, from 1 on
    pairs: tuple[_Pair, ...]

    @property
    def rank(self) -> int:
        """The highest of its modules' ranks."""
        return max(pair.a.shape[0] for pair in self.pairs)

    @property
    def sites(self) -> frozenset[Site]:
        return frozenset(pair.module.site for pair in self.pairs)

    @property
    def num_matrices(self) -> int:
        """Number of the checkpoint's modules that it changes."""
        return len(self.pairs)

    def factors(self) -> dict[str, MatrixFactors]:
        """Read the factors, by path of the weight. Raises ModelError for values that are not finite."""
        found: dict[str, tuple[list[np.ndarray | None], list[np.ndarray | None]]] = {}
        for module, a, b, scale in self.pairs:
            none: list[np.ndarray | None] = [None] * module.num_parts
            of_a, of_b = found.setdefault(module.weight, (none, none[:]))
            values, rows = self._read(a, 1.0), self._read(b, scale)[module.order]
            for i, part in enumerate(np.split(rows, np.cumsum(module.sizes)[:-1]), module.first):
                of_a[i], of_b[i] = values, part
        return {weight: MatrixFactors(tuple(a), tuple(b)) for weight, (a, b) in found.items()}

    def _read(self, tensor: StoredTensor, scale: float) -> np.ndarray:
        with np.errstate(over="ignore"):
            values = tensor.read().astype(np.float32) * np.float32(scale)
        if not (np.abs(values) < _LARGEST).all():  # false for NaN
            limit = f"values that are NaN, infinite or above {_LARGEST:g}"
            raise ModelError(f"{self.path}: {tensor.name} has {limit}; the adapter is damaged")
        return values


def open_adapter(path: Path, config: DecoderConfig, names: TensorNames) -> AdapterFiles:
    """Read an adapter's config and header, but no values. Raises one ModelError that lists all that does not fit."""
    lora = read_lora_config(path)
    file = path / _WEIGHTS_FILE
    if not file.is_file():
        is_pickle = f"; {_PICKLE} is a pickle, which can run code: convert it to safetensors"
        raise ModelError(f"{path} has no {_WEIGHTS_FILE}{is_pickle if (path / _PICKLE).is_file() else ''}")
    data, fingerprint = _read_whole(path / CONFIG_FILE, file)
    stored = read_safetensors(file, data)
    if not stored:
        raise ModelError(f"{file} holds no tensors")
    pairs, problems = _paired(stored, lora, config, names)
    if problems:
        raise ModelError(
            f"{path}, made for {lora.base_model_name_or_path or 'a model it does not name'}, does not fit this model "
            f"({config.architecture}, {config.num_layers} layers):\n  "
            + "\n  ".join(listed(label, found) for label, found in problems.items())
        )
    checksum = zlib.crc32(data, zlib.crc32((path / CONFIG_FILE).read_bytes())) + 1
    return AdapterFiles(path, lora.base_model_name_or_path or "", fingerprint, checksum, tuple(pairs))


def _read_whole(config: Path, file: Path) -> tuple[np.ndarray, str]:
    """Return the bytes of the weights, and a fingerprint of both files. The bytes are not mapped: a file that is written anew
    would end the process. Raises ModelError for one that changes meanwhile."""

    def states() -> str:
        found = (each.stat() for each in (config, file))
        return " ".join(f"{state.st_size} {state.st_mtime_ns}" for state in found)

    with reading(file):
        before, data = states(), np.fromfile(file, np.uint8)
    if states() != before:
        raise ModelError(f"{file} is being written; load the adapter when it is there")
    return data, before


def _paired(
    stored: Mapping[str, StoredTensor], lora: LoraConfig, config: DecoderConfig, names: TensorNames
) -> tuple[list[_Pair], Mapping[str, list[str]]]:
    """Return the factors with their modules, and by kind the names of all tensors and modules that do not fit."""
    modules, ours = dict(_modules(config, names)), common_module(names)
    found: dict[str, dict[str, StoredTensor]] = defaultdict(dict)  # by module, its A and B
    problems: dict[str, list[str]] = defaultdict(list)
    for name, tensor in sorted(stored.items()):
        if factor := re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name):
            found[factor[1]][factor[2]] = tensor
        else:
            problems[_NOT_APPLIED].append(name)
    theirs = _prefix(found, modules, ours)
    pairs = []
    for path, factors in found.items():
        name = ours + path.removeprefix(theirs) if path.startswith(theirs) else path
        module = modules.get(name) if path.startswith(theirs) else None
        if module is None:
            kind = _NOT_APPLIED if name in modules else "tensors of modules that the model does not have"
            problems[kind] += [t.name for t in factors.values()]
        elif len(factors) == 1:
            problems["factors without the other one of A and B"] += [t.name for t in factors.values()]
        elif not lora.targets(path):
            problems["tensors of modules that the config leaves out"] += [t.name for t in factors.values()]
        else:
            rank, (rows, columns) = lora.rank(path), module.shape
            for tensor, shape in ((factors["A"], (rank, columns)), (factors["B"], (rows, rank))):
                if not tensor.supported:
                    problems["tensors of an unsupported type"].append(f"{tensor.name} ({tensor.dtype})")
                elif tensor.shape != shape:
                    wrong = f"{tensor.name} is {list(tensor.shape)}, not {list(shape)}"
                    problems["tensors of another shape than the model and the config's rank need"].append(wrong)
            pairs.append(_Pair(module, factors["A"], factors["B"], lora.scale(path)))
    for name, module in modules.items():
        path = theirs + name.removeprefix(ours)
        if module is not None and path not in found and lora.targets(path):
            problems["modules without tensors, though target_modules names them"].append(path)
    return pairs, problems


def _modules(config: DecoderConfig, names: TensorNames) -> Iterator[tuple[str, _Module | None]]:
    """Yield each linear module of the model, by its name in the family's table; None for one that adapters cannot change."""
    yield names.lm_head.removesuffix(".weight"), None  # declared by itself only where it is not tied
    for keys, spec in jax.tree_util.tree_flatten_with_path(declare_plain(config, "float32"))[0]:
        path, site = jax.tree_util.keystr(keys), site_of(keys)
        if not spec.is_matrix or path.startswith(".draft"):
            continue
        stored, rows = stored_parts(path, spec, config, names)
        order, parts = rows.order if rows else slice(None), spec.parts or (spec.shape[0],)
        held = len(parts) // len(stored)  # parts in a stored matrix, unless they are experts
        for i, (name, shape) in enumerate(stored.items()):
            held_here = (i * held, parts[i * held :][:held])
            module = _Module(path, site, len(parts), *held_here, shape, order) if site in ADAPTED_SITES else None
            yield name.removesuffix(".weight"), module


def _prefix(found: Mapping[str, object], modules: Mapping[str, _Module | None], ours: str) -> str:
    """Return the prefix of the text model's modules in the file: the one with which most of them are found."""

    def fitting(prefix: str) -> int:
        return sum(path.startswith(prefix) and ours + path.removeprefix(prefix) in modules for path in found)

    return max((ours, *_PREFIXES), key=fitting)
