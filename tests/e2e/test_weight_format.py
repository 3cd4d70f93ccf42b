"""Tests of a weight format made up here: it is one scheme, and a model stored in it is served.

Every value is a signed power of two times the size of its row. Files hold the exponents as "NAME.powers" and the sizes as
"NAME.size".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import GREEDY, Build
from jax.typing import DTypeLike
from safetensors.numpy import load_file, save_file

from sgl_jax.engine import weight_files
from sgl_jax.engine.core import Core
from sgl_jax.models.families import decoder_config
from sgl_jax.models.formats.form import Form
from sgl_jax.models.quantised import Matrix, Quantised
from sgl_jax.models.spec import WeightSpec
from sgl_jax.models.stored import StoredTensor
from sgl_jax.ops.dense.api import plain_product
from sgl_jax.ops.quantized_matmul.api import QuantizedMatmul
from sgl_jax.runtime.buckets import Bucket
from simulated import Client

ONE_STEP = Bucket(16, 2)


@dataclasses.dataclass(frozen=True)
class Powers:
    """Value p of a row stands for sign(p) * 2 ** (1 - |p|) * the row's size."""

    form = Form("powers", "a size for each row", "other")

    def skips(self, module: str) -> bool:
        raise AssertionError("the tensors tell")

    def view(self, stored: Mapping[str, StoredTensor]) -> Mapping[str, StoredTensor]:
        tensors = dict(stored)
        for name in [name.removesuffix(".powers") for name in stored if name.endswith(".powers")]:
            planes = {"values": tensors.pop(f"{name}.powers"), "scales": tensors.pop(f"{name}.size")}
            nbytes = sum(plane.nbytes for plane in planes.values())
            tensors[name] = StoredTensor(name, planes["values"].shape, "powers", nbytes, _no_floats, planes=planes)
        return tensors

    def declare(self, site: str, spec: WeightSpec) -> Matrix[WeightSpec]:
        if site == "lm_head":
            return spec
        sizes = dataclasses.replace(spec, shape=spec.shape[:-1], axes=spec.axes[:-1], dtype="float32")
        return Quantised(dataclasses.replace(spec, dtype="int8"), sizes, self)

    def read(self, tensor: StoredTensor) -> Quantised[StoredTensor]:
        return Quantised(tensor.planes["values"], tensor.planes["scales"], self)

    def multiply(
        self, x: jax.Array, w: Quantised[jax.Array], matmul: QuantizedMatmul, out_dtype: DTypeLike
    ) -> jax.Array:
        powers = w.values.astype(jnp.float32)
        matrix = jnp.sign(powers) * jnp.exp2(1 - jnp.abs(powers)) * w.scales[..., None]
        return plain_product(x, matrix.astype(x.dtype), out_dtype)

    def multiply_grouped(self, *_: object) -> jax.Array:
        raise AssertionError("the model has no experts")


def _no_floats(start: int, stop: int) -> np.ndarray:
    raise AssertionError("the planes are read, not the floats")


def convert(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return powers, sizes, and the floats that they stand for."""
    sizes = np.abs(matrix).max(-1)
    below = np.rint(np.log2(sizes[:, None] / np.maximum(np.abs(matrix), 1e-9))).clip(0, 20)
    powers = (np.sign(matrix) * (1 + below)).astype(np.int8)
    return powers, sizes, np.sign(powers) * np.float32(2) ** (1 - np.abs(powers.astype(np.float32))) * sizes[:, None]


def answer(core: Core) -> list[int]:
    client = Client(core)
    client.submit(0, [1, 403, 407, 261, 378], **GREEDY, max_tokens=24)
    client.run()
    assert core.runner.compiles_after_ready == 0
    return client.answers[0].tokens


def test_a_model_in_a_format_of_ones_own_is_served(
    stories260k: Path, tmp_path: Path, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, floats = tmp_path / "packed", tmp_path / "floats"
    in_powers: dict[str, np.ndarray] = {}
    as_floats: dict[str, np.ndarray] = {}
    for name, tensor in load_file(stories260k / "model.safetensors").items():
        as_floats[name] = tensor.astype(np.float32)
        if name.endswith("_proj.weight"):
            in_powers[f"{name}.powers"], in_powers[f"{name}.size"], as_floats[name] = convert(as_floats[name])
        else:
            in_powers[name] = as_floats[name]
    for folder, tensors in ((packed, in_powers), (floats, as_floats)):
        folder.mkdir()
        for file in stories260k.iterdir():
            if file.suffix in (".json", ".model"):
                (folder / file.name).write_bytes(file.read_bytes())
        save_file(tensors, folder / "model.safetensors")

    plain = build(floats, ONE_STEP)
    wanted = answer(plain)
    assert len(set(wanted)) > 5  # a text, not a repeated token
    monkeypatch.setattr(
        weight_files,
        "decoder_config",
        lambda *args: dataclasses.replace(decoder_config(*args), weight_scheme=Powers(), weight_format=Powers()),
    )
    core = build(packed, ONE_STEP)
    assert answer(core) == wanted
    assert core.info.weight_bytes == sum(tensor.nbytes for tensor in in_powers.values())
    assert core.info.parameters_per_token == plain.info.parameters_per_token
