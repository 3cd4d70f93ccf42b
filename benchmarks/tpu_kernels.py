"""Scoreboard of the attention kernels for TPU, made without a TPU: the bundles that libtpu compiles them to.

    python benchmarks/tpu_kernels.py --output benchmarks/tpu_kernels.json --report benchmarks/tpu_kernels.md

A bundle is an instruction of the TensorCore: it takes one cycle, or more where it waits. So counts are lower bounds on
time, exact for comparing kernels on the scalar and vector units, and silent about copies, whose floor is bytes over
bandwidth. Needs libtpu (`pip install libtpu`), no TPU. Dumps stay in a temporary folder: libtpu's licence.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

CLOCK = {"v6e": 1.75e9, "v7x": 2.2e9}  # inferred: bfloat16 rate / (2 units x 256 x 256 x 2 per cycle)
ROWS, CHUNK_TOKENS = 256, 2048
CONTEXTS = (256, 1024, 4096)
LONG_CONTEXTS = (8192, 32768, 131072)
PRODUCTS_PER_BUNDLE = 524288  # multiplications and additions at the matrix units' rate
POOL_PAGES = 16384


@dataclasses.dataclass(frozen=True)
class Shape:
    """Heads of one device."""

    num_heads: int
    num_kv_heads: int
    key_dim: int = 128
    value_dim: int = 128
    planes: int = 2  # 1: a latent pool, whose values are the first value_dim columns of the keys

    @property
    def width(self) -> int:
        """Numbers of a key in the pool."""
        return -(-self.key_dim // 128) * 128

    @property
    def is_latent(self) -> bool:
        return self.planes == 1


# Qwen3-8B at TP 1, 4 and 8; DeepSeek-V3 at TP 1 and 4.
SHAPES = {"TP1": Shape(32, 8), "TP4": Shape(8, 2), "TP8": Shape(4, 1)} | {
    f"MLA-{heads}": Shape(heads, 1, 576, 512, planes=1) for heads in (128, 32)
}


# --- reading final bundles --------------------------------------------------------------------------------------------

_LINE = re.compile(r"\s*(?:0x[0-9a-f]+|\d+)\s+(LH|LB|LE|PB|PF|CT)?\s*: ?(>*)\s*(.*)")
_COUNTED = {"matmul": r"= vmatmul", "dma": r"= dma\.(?!done)", "spill": r"_spill\]"}


@dataclasses.dataclass
class Loop:
    """A loop of a kernel (the kernel itself at depth 0): straight pieces of code between branches, and loops inside."""

    depth: int
    pieces: list[dict[str, int]] = dataclasses.field(default_factory=lambda: [_piece()])
    loops: list[Loop] = dataclasses.field(default_factory=list)

    def total(self, what: str = "bundles") -> int:
        """Count in the loop's own code, inner loops left out."""
        return sum(piece[what] for piece in self.pieces)

    def walk(self) -> Iterator[Loop]:
        yield self
        for loop in self.loops:
            yield from loop.walk()


def _piece() -> dict[str, int]:
    return dict.fromkeys(("bundles", *_COUNTED), 0)


def read_bundles(text: str) -> Loop:
    """Read the loops of a `final_bundles` dump."""
    root = Loop(0)
    latest = [root]  # at each depth; a loop's closing branch is printed one level up, so lines go by their depth alone
    for line in text.splitlines():
        match = _LINE.match(line)
        if not match:
            continue
        label, marks, code = match.groups()
        if label == "LB":
            loop = Loop(len(marks))
            latest[len(marks) - 1].loops.append(loop)
            latest[len(marks) :] = [loop]
        current = latest[min(len(marks), len(latest) - 1)]
        if label:
            current.pieces.append(_piece())
        piece = current.pieces[-1]
        piece["bundles"] += 1
        for name, pattern in _COUNTED.items():
            piece[name] += len(re.findall(pattern, code))
        if "sbr.rel" in code:
            current.pieces.append(_piece())
    return root


def decode_figures(kernel: Loop) -> dict[str, int]:
    """Read bundles of the decode kernel: `key_block` for each block of keys that all queries see; a `row` whose last
    block is whole; and the parts of shorter ones. With W > 1 the blocks that get new tokens are a loop, counted once."""
    products_in = lambda loop: sum(each.total("matmul") for each in loop.walk())  # noqa: E731
    row = max((loop for loop in kernel.walk() if loop.depth == 1), key=products_in)
    last = next((loop for loop in row.loops if products_in(loop) > loop.total("matmul")), row)
    inner = [loop for loop in (*row.loops, *last.loops) if loop is not last]
    heavy = sorted((loop for loop in inner if loop.total("matmul")), key=lambda loop: loop.total("matmul"))
    copying = sorted((loop for loop in inner if loop.total("dma") and not loop.total("matmul")), key=Loop.total)
    block, edge, page = heavy[-1], heavy[0], copying[0]
    own = [piece for loop in {id(each): each for each in (row, last)}.values() for piece in loop.pieces]
    total = sum(piece["bundles"] for piece in own) + (copying[-1].total() if last is not row else 0)
    products = sum(piece["bundles"] for piece in own if piece["matmul"])
    copies = max(own, key=lambda piece: piece["dma"])["bundles"]
    return {
        "key_block": block.total(),
        "row": total,
        "row_without_products_and_copies": total - products - copies,
        "edge_unit": edge.total(),
        "page_alone": page.total(),
        "spills_in_block": block.total("spill"),
        "copies_in_block": block.total("dma"),
        "kernel": sum(loop.total() for loop in kernel.walk()),
    }


def chunk_figures(kernel: Loop) -> dict[str, int]:
    """Read bundles of the chunk kernel: per KV head for a tile of queries and a whole block, or an edge unit, of keys."""
    heavy = sorted((loop for loop in kernel.walk() if loop.total("matmul")), key=lambda loop: loop.total("matmul"))
    return {
        "block_of_head": heavy[-1].total(),
        "edge_unit_of_head": heavy[0].total(),
        "spills_in_block": heavy[-1].total("spill"),
        "kernel": sum(loop.total() for loop in kernel.walk()),
    }


def decode_bundles(figures: dict[str, int], context: int, block: int, unit: int, page: int, width: int = 1) -> int:
    """Return the bundles of one row with so many keys, its `width` new ones included."""
    whole, rest = divmod(context, block)
    if rest == 0 and width == 1:
        return (whole - 1) * figures["key_block"] + figures["row"]
    whole = (context - width) // block  # no block with several new tokens is seen whole by the first query
    rest = context - whole * block
    parts = -(-rest // unit) * figures["edge_unit"] + -(-rest // page) * figures["page_alone"]
    return whole * figures["key_block"] + figures["row_without_products_and_copies"] + parts


def chunk_bundles(result: dict[str, Any], num_heads: int, context: int) -> int:
    """Return the bundles of one layer for a row's last CHUNK_TOKENS tokens, when it has `context` of them.

    A tile of queries takes whole blocks as long as its first query sees all of their keys, then units. What a tile does besides is
    counted once in a straight line: loops over its heads are not multiplied, which leaves out about as much as the two
    bodies of the loop over keys add.
    """
    figures, queries, turns = result["bundles"], result["queries"], num_heads // result["heads_in_turn"]
    total = 0
    for first in range(context - CHUNK_TOKENS, context, queries):
        whole = (first + 1) // result["block"]
        units = -(-(first + queries - whole * result["block"]) // result["unit"])
        of_turn = whole * figures["block_of_head"] + units * figures["edge_unit_of_head"]
        total += turns * of_turn + figures["kernel"]
    return total


# --- compiling --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    chip: str  # v6e
    shape: str  # TP4
    page: int
    kind: str  # decode, chunks
    pool: str = "bfloat16"
    width: int = 1  # W: tokens of a decoding row

    @property
    def name(self) -> str:
        extra = [self.pool] * (self.pool != "bfloat16") + [f"W={self.width}"] * (self.width > 1)
        return " ".join([f"{self.kind} {self.chip} {self.shape} page {self.page}", *extra])


def cases() -> list[Case]:
    every = [Case(chip, shape, 128, kind) for shape in SHAPES for chip in CLOCK for kind in ("decode", "chunks")]
    eight_bits = [Case(chip, "TP4", 128, "decode", pool) for chip in CLOCK for pool in ("int8", "float8_e4m3fn")]
    wide = [Case(chip, shape, 128, "decode", width=4) for shape in SHAPES for chip in CLOCK]
    return every + [Case(chip, "TP4", 16, "decode") for chip in CLOCK] + eight_bits + wide


def use_dumps(folder: Path) -> None:
    """Let libtpu dump final bundles into the folder. Call it before jax is imported."""
    flags = (
        f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=(final_bundles).*"
    )
    os.environ |= {"LIBTPU_INIT_ARGS": flags, "JAX_PLATFORMS": "cpu"}
    from sgl_jax.planning import topology

    topology.set_tpu_environment()


def measure(selected: list[Case], dumps: Path) -> dict[str, dict[str, Any]]:
    """Compile each case and read its figures. Call use_dumps first."""
    results = {}
    for case in selected:
        before = set(dumps.glob("*"))
        compiled, blocks = compile_case(case)
        found = [f for f in set(dumps.glob("*final_bundles.txt")) - before if "schedule-analysis" not in f.name]
        name = {"decode": "fa_decode", "chunks": "fa_chunks"}[case.kind]
        dump = min(f for f in found if name in f.name)  # rows beyond those that fit into VMEM have calls of their own
        read = decode_figures if case.kind == "decode" else chunk_figures
        figures = read(read_bundles(dump.read_text()))
        print(case.name, figures, file=sys.stderr, flush=True)
        results[case.name] = dataclasses.asdict(case) | blocks | {"bundles": figures} | program_facts(compiled, name)
    return results


def compile_case(case: Case) -> tuple[Any, dict[str, int]]:
    """Compile the attention of one layer: a decode step of 256 rows, or a step of 2048 tokens."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from sgl_jax.ops.attention.api import AttentionLayer, AttentionSpec, RaggedBatch
    from sgl_jax.ops.attention.fa import blocks as sizes
    from sgl_jax.ops.attention.fa import call
    from sgl_jax.planning import topology

    shape = SHAPES[case.shape]
    tokens = ROWS * case.width if case.kind == "decode" else CHUNK_TOKENS
    row_pages = 4096 // case.page
    kv_shape = (POOL_PAGES * 16 // case.page, shape.num_kv_heads, shape.planes, case.page, shape.width)
    value_dim = shape.value_dim if shape.is_latent else None
    spec = AttentionSpec(shape.key_dim**-0.5, value_dim=value_dim, width=case.width)
    mesh = Mesh(np.array(topology.tpu_devices(topology.parse(f"{case.chip}-1"))[:1]), ("x",))

    def array(shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    def layer(q, k, v, kv, table, kv_lens, cu, num_short, per_token, first_page):
        batch = RaggedBatch(table, kv_lens, cu, num_short, *per_token)
        return call.paged_attention(q, k, v, kv, batch, AttentionLayer(spec, first_page))

    ints = lambda *shape: array(shape, jnp.int32)  # noqa: E731
    args = (
        array((tokens, shape.num_heads, shape.key_dim)),
        array((tokens, shape.num_kv_heads, shape.key_dim)),
        None if shape.is_latent else array((tokens, shape.num_kv_heads, shape.value_dim)),
        array(kv_shape, case.pool),
        ints(ROWS, row_pages),
        ints(ROWS),
        ints(ROWS + 1),
        ints(),
        (ints(tokens),) * 4,
        ints(),
    )
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        chip = sizes.current_chip()
        traced = jax.jit(layer, donate_argnums=3).trace(*args)
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    if case.kind == "decode":
        blocks = sizes.decode_blocks(chip, kv_shape, case.pool, row_pages, shape.num_heads)
    else:
        blocks = sizes.chunk_blocks(chip, kv_shape, case.pool, row_pages, shape.num_heads, tokens)
    return compiled, {"block": blocks.pages * case.page, "unit": blocks.unit_pages * case.page} | {
        "queries": getattr(blocks, "queries", 1),
        "heads_in_turn": heads_in_turn(shape, blocks.queries) if isinstance(blocks, sizes.ChunkBlocks) else 0,
        "pool_bytes": jnp.dtype(case.pool).itemsize * math.prod(kv_shape),
    }


def heads_in_turn(shape: Shape, queries: int) -> int:
    """Return the query heads that a turn of the chunk kernel's loop takes."""
    from sgl_jax.ops.attention.fa import chunks

    return math.prod(chunks.products_of(shape.num_heads, shape.num_kv_heads, queries))


@dataclasses.dataclass(frozen=True)
class Peer:
    """Attention of another project, on the TP4 shape for v6e with pages of 128."""

    name: str
    kernels: dict[str, str]  # by kind: a part of its dumps' names
    rows: dict[str, int]  # by kind: rows that a turn of its heaviest loop takes
    keys: int  # keys of each of these rows, with all 8 heads
    layer: Callable[..., Any]  # (queries, *arrays of measure_peers): the program of a layer
    pool: tuple[int, ...]


def peers() -> list[Peer]:
    """Return JAX's own, which writes no KV, with our blocks of 1024 keys, and tokamax's with the blocks it chooses."""
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    from sgl_jax.ops.attention import tokamax
    from sgl_jax.ops.attention.api import AttentionLayer, AttentionSpec, RaggedBatch

    def of_jax(queries, q, k, v, kv, table, kv_lens, cu, num_short, per_token):
        options = {"num_kv_pages_per_block": 8, "num_queries_per_block": queries, "sm_scale": 1.0}
        return ragged_paged_attention(q, kv, kv_lens, table, cu, num_short.reshape(1), **options), kv

    def of_tokamax(queries, q, k, v, kv, table, kv_lens, cu, num_short, per_token):
        batch = RaggedBatch(table, kv_lens, cu, num_short, *per_token)
        return tokamax.paged_attention(q, k, v, kv, batch, AttentionLayer(AttentionSpec(1.0), 0))

    names = "ragged_paged_attention"
    page = tokamax.backend.pool_order.page(2, 2, 128, 128, "bfloat16")
    return [
        Peer("jax", {"decode": names, "chunks": names}, {"decode": 1, "chunks": 1}, 1024, of_jax, (128, 4, 128)),
        Peer("tokamax", {"decode": "RPAd", "chunks": "RPAm"}, {"decode": 8, "chunks": 2}, 512, of_tokamax, page),
    ]


def measure_peers(dumps: Path) -> dict[str, dict[str, dict[str, int]]]:
    """Count bundles of each peer's heaviest loop, and of its whole loop over rows and tiles with inner loops counted once,
    for 1024 keys of a row and for 128 queries x 8 heads x 1024 keys."""
    import warnings

    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from sgl_jax.planning import topology

    warnings.simplefilter("ignore", DeprecationWarning)
    mesh = Mesh(np.array(topology.tpu_devices(topology.parse("v6e-1"))[:1]), ("x",))

    def array(shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    ints = lambda *shape: array(shape, jnp.int32)  # noqa: E731
    results: dict[str, dict[str, dict[str, int]]] = {}
    for peer in peers():
        results[peer.name] = {}
        for kind, tokens, queries in (("decode", ROWS, 8), ("chunks", CHUNK_TOKENS, 128)):
            new = array((tokens, 2, 128))
            pool = array((POOL_PAGES // 8, *peer.pool))
            rows = ints(ROWS, 32), ints(ROWS), ints(ROWS + 1), ints(), (ints(tokens),) * 4
            before = set(dumps.glob("*"))
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                layer = jax.jit(functools.partial(peer.layer, queries), donate_argnums=3)
                traced = layer.trace(array((tokens, 8, 128)), new, new, pool, *rows)
                compiled = traced.lower(lowering_platforms=("tpu",)).compile()
            kernel = peer.kernels[kind]
            (dump,) = set(dumps.glob(f"*{kernel}*01-final_bundles.txt")) - before
            loops = list(read_bundles(dump.read_text()).walk())
            heavy = max(loops, key=lambda loop: loop.total("matmul"))
            turns = 1024 / peer.keys / peer.rows[kind]
            results[peer.name][kind] = {
                "loop": round(heavy.total() * turns),
                "all": round(sum(loop.total() for loop in loops if loop.depth) * turns),
                "spills": heavy.total("spill"),
            } | program_facts(compiled, kernel)
    return results


def program_facts(compiled: Any, kernel: str) -> dict[str, int]:
    """Read bytes of a program around a kernel; copied: results of the copies and transpositions beside the kernel."""
    from sgl_jax.planning import hlo

    memory = compiled.memory_analysis()
    text = compiled.as_text()
    call = next(line for line in text.splitlines() if "custom-call(" in line and kernel in line)
    attributes = text[text.index(call) :]  # they may go on in the next lines
    used = re.search(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"0","size":"(\d+)"', attributes)
    assert used is not None
    around = [each for each in hlo.read(text).instructions() if each.opcode in ("copy", "transpose", "copy-start")]
    return {
        "code_bytes": memory.generated_code_size_in_bytes,
        "copied_bytes": sum(each.nbytes for each in around),
        "aliased_bytes": memory.alias_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "vmem_bytes": int(used[1]),
        "cost_flops": int(compiled.cost_analysis().get("flops", 0)),
    }


# --- bytes ------------------------------------------------------------------------------------------------------------


def decode_bytes(context: int, page: int, shape: Shape, itemsize: int = 2, width: int = 1) -> tuple[int, int]:
    """Return the bytes moved between HBM and the core for one row of a layer, and the least that could be.

    Moved are its pages, the row tile with the new tokens (or two, if they straddle), its page ids (512 bytes a block), q
    and o. The least are its keys and values, the new ones, q and o, all without padding."""

    def ends(width: int) -> int:
        values = -(-shape.value_dim // 128) * 128
        return (shape.num_heads * (width + values) + shape.planes * shape.num_kv_heads * width) * 2

    token = shape.planes * shape.num_kv_heads * shape.width * itemsize
    least = shape.planes * shape.num_kv_heads * shape.key_dim * itemsize
    tile = 32 // itemsize
    tiles = tile + width - 1  # lines written on average: those of a tile, times 1 + (W - 1) / lines
    moved = -(-context // page) * page * token + tiles * token + width * ends(shape.width)
    return moved + 512 * -(-context // 1024), (context + width) * least + width * ends(shape.key_dim)


# --- the report -------------------------------------------------------------------------------------------------------


def _label(result: dict[str, Any]) -> str:
    width = result.get("width", 1)
    return f"{result['chip']} {result['shape']} page {result['page']} {result['pool']}" + f" W={width}" * (width > 1)


def _decode_tables(results: dict[str, dict[str, Any]]) -> list[str]:
    from sgl_jax.planning.topology import CHIPS

    lines = [
        "",
        "## Decode: one row of one layer",
        "",
        "| case | keys | bundles | copy floor, cycles | binds | bytes / least bytes |",
        "|---|---|---|---|---|---|",
    ]
    for result in results.values():
        if result["kind"] != "decode":
            continue
        rate = CHIPS[result["chip"]].bytes_per_s / CLOCK[result["chip"]]
        for context in CONTEXTS:
            width = result.get("width", 1)
            sizes = result["block"], result["unit"], result["page"], width
            bundles = decode_bundles(result["bundles"], context, *sizes)
            itemsize = 1 + (result["pool"] == "bfloat16")
            moved, least = decode_bytes(context, result["page"], SHAPES[result["shape"]], itemsize, width)
            floor = round(moved / rate)
            case = _label(result)
            binds = "copies" if floor > bundles else "bundles"
            lines.append(f"| {case} | {context} | {bundles} | {floor} | {binds} | {moved / least:.3f} |")
    lines += [
        "",
        "| case | bundles per block of keys | block | edge unit | page alone | spills in block | VMEM MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results.values():
        if result["kind"] == "decode":
            b = result["bundles"]
            case = _label(result)
            lines.append(
                f"| {case} | {b['key_block']} | {result['block']} | {b['edge_unit']} per {result['unit']} | "
                f"{b['page_alone']} | {b['spills_in_block']} | {result['vmem_bytes'] / 1e6:.1f} |"
            )
    return lines


def _chunk_table(results: dict[str, dict[str, Any]]) -> list[str]:
    lines = [
        "",
        "## Chunks: a turn over the heads of a tile of queries",
        "",
        f"{PRODUCTS_PER_BUNDLE} multiplications and additions a bundle is the matrix units' rate; heads of 128 can use half of it.",
        "",
        "| case | queries x heads x keys | bundles | flop per bundle | of the rate | edge unit | VMEM MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results.values():
        if result["kind"] == "chunks":
            b, shape, group = result["bundles"], SHAPES[result["shape"]], result["heads_in_turn"]
            flop = 2 * result["queries"] * group * result["block"] * (shape.key_dim + shape.value_dim)
            lines.append(
                f"| {result['chip']} {result['shape']} | {result['queries']} x {group} x {result['block']} | "
                f"{b['block_of_head']} | {flop / b['block_of_head'] / 1e3:.0f}k | "
                f"{flop / b['block_of_head'] / PRODUCTS_PER_BUNDLE:.0%} | {b['edge_unit_of_head']} per {result['unit']} | "
                f"{result['vmem_bytes'] / 1e6:.1f} |"
            )
    return lines


def _long_table(results: dict[str, dict[str, Any]]) -> list[str]:
    from sgl_jax.planning.topology import CHIPS

    lines = [
        "",
        "## Long contexts",
        "",
        "Thousands of cycles of one layer, pages of 128, bfloat16. Decode: one row, the longer of bundles and copies; of the rate: keys and",
        "values read once, over that. A device has one core, so a row is not divided. Prompt: the last 2048 tokens of a row of so many, bundles of",
        "loops over blocks of keys and of each tile's straight code; copies of pages, which each tile of queries reads, take less. Of the reachable:",
        "the products of seen keys at the matrix rate, or at half of it where heads have 128 numbers, over that.",
        "",
        "| case | keys | decode | of the rate | prompt | copies | of the reachable |",
        "|---|---|---|---|---|---|---|",
    ]
    for shape_name, shape in SHAPES.items():
        for chip in CLOCK:
            decode, chunks = (results.get(f"{kind} {chip} {shape_name} page 128") for kind in ("decode", "chunks"))
            if decode is None or chunks is None:
                continue
            rate = CHIPS[chip].bytes_per_s / CLOCK[chip]
            reachable = PRODUCTS_PER_BUNDLE if shape.is_latent else PRODUCTS_PER_BUNDLE / 2
            for context in LONG_CONTEXTS:
                moved, least = decode_bytes(context, 128, shape)
                bundles = decode_bundles(decode["bundles"], context, decode["block"], decode["unit"], 128)
                row = max(bundles, moved / rate)
                prompt = chunk_bundles(chunks, shape.num_heads, context)
                pairs = CHUNK_TOKENS * (2 * context - CHUNK_TOKENS + 1) / 2
                products = 2 * pairs * shape.num_heads * (shape.key_dim + shape.value_dim)
                tiles = CHUNK_TOKENS / chunks["queries"]
                copies = tiles * context * shape.planes * shape.num_kv_heads * shape.width * 2 / rate
                lines.append(
                    f"| {chip} {shape_name} | {context} | {row / 1e3:.1f} | {least / rate / row:.0%} | {prompt / 1e3:,.0f} | "
                    f"{copies / 1e3:,.0f} | {products / reachable / prompt:.0%} |"
                )
    return lines


def _peer_table(results: dict[str, dict[str, Any]], peers: dict[str, dict[str, dict[str, int]]]) -> list[str]:
    lines = [
        "",
        "## Beside others",
        "",
        "v6e, TP4, page 128. JAX's own ragged paged attention (`jax.experimental.pallas.ops.tpu`), its blocks set to the same",
        "1024 keys: it takes new KV that something else has written, so a program with it has a scatter more. tokamax's",
        "(`--attention-backend tokamax`), with the blocks that it chooses: 512 keys of 8 rows, or of 2 chunks. Its work list",
        "is made by three more kernels a step, which are not counted. Bytes are those of the whole program of one layer: 256",
        "rows with a token, or 2048 tokens. Interpret mode cannot run theirs (no `ref.bitcast`), so their errors are not known;",
        "ours is below 1e-5 in float32 (`tests/ops/attention/`). What is copied beside ours turns q and o from [T, N, H], as",
        "this program gets them, to [T, N * H], the form in which a step splits them off its products; copies of a whole step",
        "are not counted here.",
        "",
        f"| | {' | '.join(peers)} | ours |",
        f"|---|{'---|' * len(peers)}---|",
    ]
    mine = {kind: results[f"{kind} v6e TP4 page 128"] for kind in ("decode", "chunks")}
    ours = {kind: each["bundles"] for kind, each in mine.items()}
    rows = [
        ("bundles: decode, each 1024 keys of a row", "decode", "loop", ours["decode"]["key_block"]),
        ("bundles: decode, a row of 1024 keys", "decode", "all", ours["decode"]["row"]),
        (
            "bundles: chunks, 128 queries x 8 heads x 1024 keys",
            "chunks",
            "loop",
            ours["chunks"]["block_of_head"] * 8 * 128 // (mine["chunks"]["heads_in_turn"] * mine["chunks"]["queries"]),
        ),
    ]
    lines += [
        f"| {what} | {' | '.join(str(peer[kind][name]) for peer in peers.values())} | {our} |"
        for what, kind, name, our in rows
    ]
    facts = {"VMEM": "vmem_bytes", "program": "code_bytes", "copied beside the kernel": "copied_bytes"}
    for what, name in facts.items():
        for kind in ("decode", "chunks"):
            kilobytes = [round(each[kind][name] / 1e3) for each in (*peers.values(), mine)]
            lines.append(f"| kB of {what}, {kind} | {' | '.join(map(str, kilobytes))} |")
    return lines


def report(results: dict[str, dict[str, Any]], peers: dict[str, dict[str, dict[str, int]]], libtpu: str) -> str:
    lines = [
        "# Attention kernels for TPU, in bundles",
        "",
        f"Made by `python benchmarks/tpu_kernels.py` with libtpu {libtpu}; nothing here ran on a TPU. A bundle is at least",
        "a cycle of the core; copies run beside it and take at least bytes / bandwidth. The larger of the two columns",
        "binds. Clocks are inferred from the chips' rates: v6e 1.75 GHz, v7x 2.2 GHz. q in bfloat16. TP1, 4 and 8: heads of",
        "128, those of Qwen3-8B. MLA-N: N heads over a latent pool, 512 + 64 numbers a token padded to 640, the first 512",
        "the value: DeepSeek-V3 on one device and on 4. W=4: rows of 4 new tokens, the last of so many keys.",
    ]
    lines += (
        _decode_tables(results)
        + _chunk_table(results)
        + _long_table(results)
        + (_peer_table(results, peers) if peers else [])
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="a regular expression that names of cases must match")
    parser.add_argument("--output", type=Path, help="JSON of all figures")
    parser.add_argument("--report", type=Path, help="the tables, in Markdown")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as dumps:
        use_dumps(Path(dumps))
        others = {} if args.only else measure_peers(Path(dumps))
        results = measure([case for case in cases() if re.search(args.only, case.name)], Path(dumps))
    libtpu = version("libtpu")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    record = {
        "libtpu": libtpu,
        "jax": version("jax"),
        "commit": commit.stdout.strip(),
        "cases": results,
        "peers": others,
    }
    if args.output:
        args.output.write_text(json.dumps(record, indent=1) + "\n")
    text = report(results, others, libtpu)
    if args.report:
        args.report.write_text(text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
