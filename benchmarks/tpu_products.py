"""Products of many tokens with a matrix as libtpu compiles them: our kernels beside XLA's, without a TPU.

    python benchmarks/tpu_products.py --output benchmarks/tpu_products.json --report benchmarks/tpu_products.md [--only REGEX]

Instructions of a kernel are counted in its compiled bundles, as in tpu_kernels.py. What it copies is its bytes at the memory's
full rate. A product takes about the longer of the two. XLA's is the compiler's own estimate, which has both.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import re
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tpu_kernels

HEAD = """# Products of many tokens on a v6e

Made by `python benchmarks/tpu_products.py` with libtpu {libtpu}; nothing here ran on a TPU. Matrices are those of one of four chips,
in bfloat16; `gate_up` has the activation with it. Thousands of cycles of one product: of the multiplications at the matrix units'
rate, of the kernel's instructions, of its copies at the memory's full rate, and of the compiler's estimate for XLA's product (and the
activation, which XLA computes apart or as part of the next product). Rate: multiplications over the longer of instructions and copies, or over XLA's estimate.

| model | matrix | tokens | multiplications | instructions | copies | XLA | rate | XLA's |
|---|---|---|---|---|---|---|---|---|
"""


@dataclasses.dataclass(frozen=True)
class Case:
    model: str
    site: str
    tokens: int
    inputs: int
    outputs: int  # both of gate and of up

    @property
    def name(self) -> str:
        return f"{self.model} {self.site} {self.tokens}"


def cases() -> list[Case]:
    matrices = {
        "Qwen3-8B": {"qkv": (4096, 1536), "o": (1024, 4096), "gate_up": (4096, 6144), "down": (3072, 4096)},
        "Qwen3-32B": {"qkv": (5120, 2560), "o": (2048, 5120), "gate_up": (5120, 12800), "down": (6400, 5120)},
    }
    every = [(model, site, *sides) for model, sites in matrices.items() for site, sides in sites.items()]
    return [Case(model, site, tokens, *sides) for model, site, *sides in every for tokens in (1024, 2048)]


def measure(case: Case, dumps: Path) -> dict[str, Any]:
    """Compile the kernel and XLA's product for a v6e. Call tpu_kernels.use_dumps first."""
    import jax
    import jax.numpy as jnp

    from sgl_jax.models.layers import gated
    from sgl_jax.models.linear import gated_linear, linear
    from sgl_jax.ops.dense import api, pallas_tpu
    from sgl_jax.parallel.placement import Placement
    from sgl_jax.planning import hlo
    from sgl_jax.planning.topology import parse, tpu_devices

    topology = parse("v6e-1")
    placement = Placement.over(tpu_devices(topology)[:1])
    number = 2 if case.site == "gate_up" else 1
    act, blocks = functools.partial(gated, activation="silu"), []

    def ours(x, w):
        blocks.append(pallas_tpu.blocks_for(x, w.reshape(number, -1, case.inputs), None))
        return pallas_tpu.gated_product(x, w, act) if number == 2 else pallas_tpu.product(x, w)

    def of_xla(x, w):
        none = api.no_gated_product
        return gated_linear(x, w, None, act, none, linear) if number == 2 else api.plain_product(x, w)

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=placement.sharding())

    def compiled(function: Any) -> Any:
        args = array(case.tokens, case.inputs), array(case.outputs, case.inputs)
        with jax.sharding.use_abstract_mesh(placement.mesh.abstract_mesh):
            return jax.jit(function).trace(*args).lower(lowering_platforms=("tpu",)).compile()

    before = set(dumps.glob("*"))
    kernel = compiled(ours)
    found = [each for each in set(dumps.glob("*dense*final_bundles.txt")) - before if "schedule" not in each.name]
    (call,) = (each for each in hlo.read(kernel.as_text()).instructions() if each.opcode == "custom-call")
    xla = sum(each.cycles for each in hlo.read(compiled(of_xla).as_text()).instructions())
    sizes = blocks[0]
    turns = case.tokens // sizes.tokens * -(-case.outputs // number // sizes.rows)
    own, *chunks = tpu_kernels.read_bundles(min(found).read_text()).loops[0].walk()
    of_chunks = sizes.tokens // sizes.chunk * sum(loop.total() for loop in chunks)
    clock = topology.chip.clock_hz
    return dataclasses.asdict(case) | {
        "blocks": sizes._asdict(),
        "multiplications": round(call.stated[0] / topology.chip.flops["bfloat16"] * clock),
        "instructions": turns * (own.total() + of_chunks),
        "copies": round(call.stated[1] / topology.chip.bytes_per_s * clock),
        "xla": xla,
        "temp_bytes": kernel.memory_analysis().temp_size_in_bytes,
    }


def report(record: dict[str, Any]) -> str:
    lines = []
    for each in record["cases"].values():
        cycles = " | ".join(f"{each[key] / 1000:.1f}" for key in ("multiplications", "instructions", "copies", "xla"))
        rates = [each["multiplications"] / n for n in (max(each["instructions"], each["copies"]), each["xla"])]
        start = f"| {each['model']} | {each['site']} | {each['tokens']} | {cycles} "
        lines.append(start + "".join(f"| {rate:.0%} " for rate in rates) + "|")
    return HEAD.format(libtpu=record["libtpu"]) + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--report", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tpu_kernels.use_dumps(Path(folder))
        chosen = [case for case in cases() if re.search(args.only, case.name)]
        found = {case.name: measure(case, Path(folder)) for case in chosen}
    record = {"libtpu": version("libtpu"), "jax": version("jax"), "cases": found}
    args.output.write_text(json.dumps(record, indent=1) + "\n")
    if args.report:
        args.report.write_text(report(record))


if __name__ == "__main__":
    main()
