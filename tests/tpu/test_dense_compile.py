"""The products of many tokens as libtpu compiles them: few instructions, and no matrix is copied."""

from __future__ import annotations

import functools
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from sgl_jax.models.layers import GATED, gated
from sgl_jax.ops import norm_tpu
from sgl_jax.ops.dense import pallas_tpu
from sgl_jax.parallel.placement import Placement
from sgl_jax.planning.topology import parse, tpu_devices

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "tpu_products.py"
COMMITTED = json.loads(SCRIPT.with_suffix(".json").read_text())
SILU = functools.partial(gated, activation="silu")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """Measure in a process of its own, as libtpu reads its flags once."""
    out = tmp_path_factory.mktemp("products") / "products.json"
    command = [sys.executable, str(SCRIPT), "--only", "8B .* 1024", "--output", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())["cases"]


def test_instructions_are_as_few_as_committed(measured: dict[str, dict]) -> None:
    assert len(measured) == 4
    for name, case in measured.items():
        assert case["instructions"] < 1.03 * COMMITTED["cases"][name]["instructions"]
        assert case["temp_bytes"] == 0


def test_a_part_of_a_prompt_reaches_nine_tenths_of_the_matrix_rate() -> None:
    """The committed figures of Qwen3-8B agree with the rate that planning/step_time.py takes for a kernel."""
    cases = [case for name, case in COMMITTED["cases"].items() if name.startswith("Qwen3-8B") and name.endswith("1024")]
    multiplied, taken = (sum(case[key] for case in cases) for key in ("multiplications", "instructions"))
    assert multiplied > 0.9 * taken
    assert all(max(case["instructions"], case["copies"]) < case["xla"] for case in COMMITTED["cases"].values())


@pytest.mark.parametrize(
    ("chip", "tokens", "inputs", "outputs", "is_gated"),
    [
        ("v6e-1", 2048, 14336, 4096, False),
        ("v7x-1", 2048, 14336, 4096, False),
        ("v5e-1", 2048, 4096, 6144, False),
        ("v6e-1", 8192, 28672, 8192, False),
        ("v6e-1", 1056, 1024, 1152, False),
        ("v6e-1", 2048, 1024, 16384, False),
        ("v6e-1", 2048, 4096, 14336, True),
        ("v6e-1", 8192, 8192, 28672, True),
        ("v6e-1", 1024, 5120, 3200, True),
        ("v7x-1", 2048, 8192, 7168, True),
        ("v7x-1", 1024, 5120, 3200, True),
        ("v5e-1", 1056, 3584, 3584, True),
        ("v6e-1", 2048, 1152, 6912, True),
    ],
)
def test_shapes_fit_and_copy_nothing(chip: str, tokens: int, inputs: int, outputs: int, is_gated: bool) -> None:
    """In one piece and in several, with a last block that is not full, and with few inputs for many outputs."""
    product = functools.partial(pallas_tpu.gated_product, gated=SILU) if is_gated else pallas_tpu.product
    assert _temporaries(chip, product, (tokens, inputs), (outputs * (1 + is_gated), inputs)) == 0


def test_matrices_too_wide_for_the_chip_are_left_to_xla() -> None:
    def nothing(x, w):
        assert pallas_tpu.gated_product(x, w, SILU) is None
        return norm_tpu.rms_norm(x, w[0], 1e-6)

    _temporaries("v7x-1", nothing, (2048, 14336), (8192, 14336))


@pytest.mark.parametrize("chip", ["v6e-1", "v7x-1", "v5e-1"])
@pytest.mark.parametrize(("tokens", "width"), [(128, 1024), (256, 5120), (2048, 4096), (400, 16384)])
def test_norms_fit(chip: str, tokens: int, width: int) -> None:
    factors = 1 << 17  # bytes in float32, at most
    norm, added_norm = (functools.partial(each, eps=1e-6) for each in (norm_tpu.rms_norm, norm_tpu.added_norm))
    assert _temporaries(chip, norm, (tokens, width), (width,)) < factors
    assert _temporaries(chip, added_norm, (tokens, width), (tokens, width), (width,)) < factors


@pytest.mark.parametrize("activation", GATED)
def test_every_activation_compiles(activation: str) -> None:
    """Exact GELU needs erf, since kernels have no erfc."""
    act = functools.partial(gated, activation=activation)
    assert (
        _temporaries("v6e-1", functools.partial(pallas_tpu.gated_product, gated=act), (1024, 1024), (2048, 1024)) == 0
    )


def _temporaries(chip: str, function, *shapes: tuple[int, ...]) -> int:
    """Compile the function, which has one kernel. Return the bytes it needs beside its arguments."""
    placement = Placement.over(tpu_devices(parse(chip))[:1])
    args = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=placement.sharding()) for shape in shapes]
    with jax.sharding.use_abstract_mesh(placement.mesh.abstract_mesh):
        compiled = jax.jit(function).trace(*args).lower(lowering_platforms=("tpu",)).compile()
    assert compiled.as_text().count("tpu_custom_call") == 1
    return compiled.memory_analysis().temp_size_in_bytes
