"""Report what quantised products cost on a TPU beside bfloat16, as libtpu compiles them, without a TPU.

    python benchmarks/tpu_quantisation.py --output benchmarks/tpu_quantisation.json --report benchmarks/quantisation.md

The matrix is larger than VMEM, so that every product reads it from HBM. Products in plain XLA have the compiler's estimate of
cycles. Pallas kernels have none: their final bundles are counted, each at least a cycle, and copies run beside them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tpu_kernels

OUTPUTS, INPUTS = 57344, 8192  # gate and up of Llama-3.1-70B
TOKENS = (8, 32, 128)
MODELS = ("Qwen3-8B", "Qwen3-32B", "Qwen3-30B-A3B", "DeepSeek-V3")


@dataclasses.dataclass(frozen=True)
class Form:
    """How the matrix is held: dtype of its values, inputs that share a scale, and to what tokens are rounded."""

    dtype: str
    group: int | None = None
    rounding: str | None = None

    @property
    def name(self) -> str:
        return self.dtype + f", groups of {self.group}" * bool(self.group) + ", tokens too" * bool(self.rounding)

    @property
    def nbytes(self) -> float:
        """Bytes of a value, its part of a scale included."""
        bits = {"bfloat16": 16, "int4": 4}.get(self.dtype, 8)
        scales = 0 if self.dtype == "bfloat16" else 4 / (self.group or INPUTS)
        return bits / 8 + scales


FP8 = "float8_e4m3fn"
FORMS = [Form("bfloat16"), Form("int8"), Form("int8", rounding="int8"), Form(FP8), Form(FP8, rounding=FP8)]
FORMS += [Form("int4", 128), Form("int4", 32), Form(FP8, 128)]


def measure(chip: str, tokens: int, form: Form, dumps: Path) -> dict[str, Any]:
    """Compile a product, and read what it takes."""
    import jax
    import jax.numpy as jnp

    from sgl_jax.ops.dense.api import plain_product
    from sgl_jax.ops.quantized_matmul.api import Planes
    from sgl_jax.ops.quantized_matmul.pallas_tpu import quantized_matmul
    from sgl_jax.parallel.placement import Placement
    from sgl_jax.planning import hlo
    from sgl_jax.planning.topology import parse, tpu_devices

    placement = Placement.over(tpu_devices(parse(f"{chip}-1"))[:1])

    def array(dtype: str, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=placement.sharding())

    x, values = array("bfloat16", tokens, INPUTS), array(form.dtype, OUTPUTS, INPUTS)
    scales = array("float32", OUTPUTS, INPUTS // (form.group or INPUTS))
    before = set(dumps.glob("*"))
    with jax.sharding.use_abstract_mesh(placement.mesh.abstract_mesh):
        if form.dtype == "bfloat16":
            traced = jax.jit(plain_product).trace(x, values)
        else:
            product = lambda x, values, scales: quantized_matmul(x, Planes(values, scales), form.rounding)  # noqa: E731
            traced = jax.jit(product).trace(x, values, scales)
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    new = set(dumps.glob("*quantized_matmul*final_bundles.txt")) - before
    found = [each for each in new if "schedule-analysis" not in each.name]
    return {
        "chip": chip,
        "tokens": tokens,
        "form": form.name,
        "bytes": round(OUTPUTS * INPUTS * form.nbytes),
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "cycles": sum(each.cycles for each in hlo.read(compiled.as_text()).instructions()),
        "bundles": kernel_bundles(found[0].read_text(), form) if form.group else None,
    }


def kernel_bundles(text: str, form: Form) -> int:
    """Return the bundles of all turns of the kernel's loops: over blocks, over 256 outputs of one, over inputs of these."""
    from sgl_jax.ops.quantized_matmul import pallas_tpu, tiles

    block = pallas_tpu.output_block(OUTPUTS, int(INPUTS * form.nbytes))
    turns = {1: OUTPUTS // block, 2: OUTPUTS // tiles.ROWS, 3: OUTPUTS // tiles.ROWS * INPUTS // tiles.TURN}
    loops = list(tpu_kernels.read_bundles(text).walk())
    deepest = max(loop.depth for loop in loops)
    if deepest == 2:  # a block is 256 outputs
        turns[2] = turns[3]
    return sum(loop.total() * turns.get(loop.depth, 1) for loop in loops)


def weight_bytes() -> list[dict[str, Any]]:
    """Count each model's weights by scheme."""
    from sgl_jax.models.scaled import Scaled
    from sgl_jax.planning.model import find_model
    from sgl_jax.runtime.placed_weights import weight_bytes
    from sgl_jax.settings.server_args import ServerArgs

    found = []
    for name in MODELS:
        config = find_model(ServerArgs(model_path=name)).config
        for form in FORMS:
            scheme = None if form.dtype == "bfloat16" else Scaled(form.dtype, form.group)
            if form.rounding is None:
                held = weight_bytes(dataclasses.replace(config, weight_scheme=scheme), "bfloat16")
                found.append({"model": name, "form": form.name, "bytes": held})
    return found


def report(record: dict[str, Any]) -> str:
    from sgl_jax.planning.topology import CHIPS

    lines = [
        "# Quantised products on TPU",
        "",
        f"Made by `python benchmarks/tpu_quantisation.py` with libtpu {record['libtpu']}; nothing here ran on a TPU. The matrix is",
        f"[{OUTPUTS}, {INPUTS}], which no VMEM holds. Cycles are libtpu's own estimates, of the whole program. The kernel for",
        "groups has no estimate: its bundles are counted, and copies run beside them, so it takes at least the larger of bundles",
        "and floor. The floor is bytes over bandwidth, at inferred clocks (v6e 1.75 GHz, v7x 2.2 GHz).",
    ]
    for chip in tpu_kernels.CLOCK:
        rate = CHIPS[chip].bytes_per_s / tpu_kernels.CLOCK[chip]
        lines += ["", f"## {chip}, thousand cycles or bundles", ""]
        lines += [f"| values | bytes / bfloat16 | floor | {' | '.join(f'{n} tokens' for n in TOKENS)} |"]
        lines += ["|---|---|---|" + "---|" * len(TOKENS)]
        rows = [each for each in record["products"] if each["chip"] == chip]
        for form in FORMS:
            mine = [each for each in rows if each["form"] == form.name]
            base = {each["tokens"]: each["cycles"] for each in rows if each["form"] == "bfloat16"}
            cells = []
            for each in mine:
                taken = each["bundles"] or each["cycles"]
                counted = " bundles" if each["bundles"] else f" ({taken / base[each['tokens']]:.2f})"
                cells.append(f"{taken / 1e3:.0f}{counted}")
            floor, part = mine[0]["bytes"] / rate / 1e3, form.nbytes / 2
            lines.append(f"| {form.name} | {part:.3f} | {floor:.0f} | {' | '.join(cells)} |")
    temporaries = max(each["temporary_bytes"] for each in record["products"]) / 1e6
    lines += [
        "",
        f"In brackets: beside bfloat16's cycles. The programs have {temporaries:.1f} MB of temporaries at most.",
    ]
    weights = record["weights"]
    forms = [form.name for form in FORMS if form.rounding is None]
    lines += [
        "",
        "## Weights of whole models, GB",
        "",
        f"| model | {' | '.join(forms)} |",
        "|---|" + "---|" * len(forms),
    ]
    for model in MODELS:
        sizes = {each["form"]: each["bytes"] for each in weights if each["model"] == model}
        cells = [f"{sizes[form] / 1e9:.1f} ({sizes[form] / sizes['bfloat16']:.2f})" for form in forms]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    lines += ["", "Embeddings, heads, norms and routers stay in bfloat16."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON of all figures")
    parser.add_argument("--report", type=Path, help="the tables, in Markdown")
    args = parser.parse_args()
    products = []
    with tempfile.TemporaryDirectory() as dumps:
        tpu_kernels.use_dumps(Path(dumps))
        for chip in tpu_kernels.CLOCK:
            for form in FORMS:
                products += [measure(chip, tokens, form, Path(dumps)) for tokens in TOKENS]
                print(*products[-len(TOKENS) :], sep="\n", file=sys.stderr, flush=True)
        versions = {package: version(package) for package in ("jax", "libtpu")}
        record = versions | {"products": products, "weights": weight_bytes()}
    args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if args.report:
        args.report.write_text(report(record), encoding="utf-8")


if __name__ == "__main__":
    main()
