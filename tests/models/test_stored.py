"""Stored tensors keep the numbers of their file beside the floats that these stand for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save_file

from sgl_jax.models.formats.floats import mxfp4
from sgl_jax.models.formats.joined import joined
from sgl_jax.models.gpt_oss import view
from sgl_jax.models.model_errors import ModelError
from sgl_jax.models.raw_config import RawConfig
from sgl_jax.models.safetensors_file import read_safetensors
from sgl_jax.models.stored import StoredTensor, concatenated
from shards import in_memory

RNG = np.random.default_rng(0)


def pair(rows: int, columns: int, groups: int) -> tuple[StoredTensor, np.ndarray]:
    """Return an int8 matrix with scales, and its floats."""
    values = RNG.integers(-127, 128, (rows, columns)).astype(np.int8)
    scales = RNG.random((rows, groups)).astype(np.float32)
    stored = joined(in_memory("w", values), in_memory("w_scale", scales), (1, columns // groups))
    return stored, values * scales.repeat(columns // groups, axis=1)


def test_int8_and_bytes_are_read_as_the_file_has_them(tmp_path) -> None:
    tensors = {"a": RNG.integers(-128, 128, (3, 4)).astype(np.int8), "b": np.arange(6, dtype=np.uint8).reshape(2, 3)}
    save_file(tensors, tmp_path / "x.safetensors")
    stored = read_safetensors(tmp_path / "x.safetensors")
    for name, tensor in tensors.items():
        assert stored[name].read().dtype == tensor.dtype
        np.testing.assert_array_equal(stored[name].read(), tensor)
        assert not stored[name].supported  # as floats


def test_planes_follow_the_rows_that_are_taken() -> None:
    stored, floats = pair(6, 8, 2)
    order = np.array([4, 1, 2])
    taken = stored.take(order)
    np.testing.assert_array_equal(taken.read(), floats[order])
    for name, plane in stored.planes.items():
        np.testing.assert_array_equal(taken.planes[name].read(), plane.read()[order])
    assert taken.planes["values"].read().dtype == np.int8


@pytest.mark.parametrize("axis", [0, 1])
def test_planes_are_concatenated_as_their_tensors_are(axis: int) -> None:
    """Side by side, scales of channels become scales of groups."""
    parts, floats = zip(*(pair(4, 8, 1) for _ in range(3)), strict=True)
    whole = concatenated("whole", parts, axis)
    np.testing.assert_array_equal(whole.read(), np.concatenate(floats, axis))
    values, scales = whole.planes["values"].read(), whole.planes["scales"].read()
    np.testing.assert_array_equal(values, np.concatenate([part.planes["values"].read() for part in parts], axis))
    np.testing.assert_array_equal(values * scales.repeat(8, axis=1), whole.read())


def test_planes_that_do_not_fit_together_are_refused() -> None:
    one, two = pair(4, 8, 1)[0], pair(4, 8, 2)[0]
    with pytest.raises(ModelError, match=r"axis 0"):
        concatenated("whole", [one, two], 0)


def test_other_values_and_rounding() -> None:
    stored, floats = pair(4, 8, 2)
    assert stored.changed(np.negative).planes == {}
    half = stored.rounded("float16")
    np.testing.assert_array_equal(half.read(), floats.astype(np.float16))
    assert half.planes == stored.planes


def test_mxfp4_keeps_its_planes_through_a_family_s_view() -> None:
    """Rows of gate come first, in the floats, the values and the scales."""
    blocks = in_memory("b", RNG.integers(0, 256, (2, 6, 3, 16)).astype(np.uint8))
    scales = in_memory("s", RNG.integers(120, 130, (2, 6, 3)).astype(np.uint8))
    base = "model.layers.0.mlp.experts.gate_up_proj"
    stored = {f"{base}_blocks": replace(blocks, dtype="U8"), f"{base}_scales": replace(scales, dtype="U8")}
    whole = mxfp4(RawConfig()).view(stored)
    tensor, order = view(whole)[base], [0, 2, 4, 1, 3, 5]
    np.testing.assert_array_equal(tensor.read(), whole[base].read()[:, order])
    for name, plane in whole[base].planes.items():
        np.testing.assert_array_equal(tensor.planes[name].read(), plane.read()[:, order])
    values, sizes = (tensor.planes[name].read() for name in ("values", "scales"))
    np.testing.assert_array_equal(values * sizes.repeat(32, axis=-1), tensor.read())
