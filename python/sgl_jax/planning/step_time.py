"""Estimated time of a compiled TPU step, from the program as the compiler scheduled it.

The compiler estimates the cycles of each product and of most other operations, but not those of a kernel of ours, of a
collective, of a gather on SparseCores, or of a sort. Instructions run in the order of the program, whose loops, which only
drafting has, are left out. A collective takes the time of its bytes at the links' full rate and a latency; the links carry one
at a time. One that the program starts and finishes apart runs beside what stands between, so that only the rest of it is waited
for. A gather on SparseCores reads and writes its result at the memory's full rate, beside other work likewise. A kernel of
products takes the longer of the bytes that it states, at the full rate, and of the multiplications at nine tenths of the matrix
units' rate, which is what the instructions of the dense ones come to (benchmarks/tpu_products.md); norms count among these kernels.
"""

import dataclasses
import re
from collections.abc import Iterator

from sgl_jax.planning.hlo import Instruction, Module
from sgl_jax.planning.topology import Topology

STAGES = ("unpack", "embed", "attention", "mlp", "logits", "sample", "draft", "store", "prompt_logprobs")
_KERNEL = re.compile(r"/pallas_call$")
_STATED = re.compile(r"/(dense|experts|grouped|quantized)_\w+/pallas_call$")
_KERNEL_RATE = 0.9
_KINDS = ("all-reduce", "all-gather", "reduce-scatter")


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of a step in which no branch is taken, on each device. Attention kernels and sorts are only counted."""

    products: dict[str, float]  # by stage: fusions that contain a product
    others: dict[str, float]  # by stage, with what is waited for gathers on SparseCores
    in_kernels: float  # our kernels of products and norms
    exchanged: float  # during which the links are busy
    waited: float  # the part of it during which nothing else runs
    kernels: int  # launches of our own kernels
    sorts: int
    collectives: int
    sampling: float  # the longest way through the sampler's branches, once; greedy steps take none of it

    @property
    def seconds(self) -> float:
        """The sum of what runs one after the other, without attention kernels and sorts."""
        return sum(self.products.values()) + sum(self.others.values()) + self.in_kernels + self.waited


@dataclasses.dataclass(frozen=True)
class _Exchange:
    kind: str
    nbytes: int  # the whole array, which every device has before or after it

    def seconds(self, topology: Topology, devices: int) -> float:
        """Return how long it takes. A sum is a scatter and a gather that take equally long (Patarasuk and Yuan, 2009)."""
        summed = self.nbytes / topology.all_reduce_bytes_per_s(devices) + topology.all_reduce_latency_s(devices)
        return summed if self.kind == "all-reduce" else summed / 2


def step_time(module: Module, topology: Topology, devices: int) -> StepTime:
    """Estimate a step of a launch whose sums go over this many devices."""
    chip, clock = topology.chip, topology.chip.clock_hz
    time = link = waited = exchanged = 0.0  # since the step began: of the device, and of the links
    products, others, under_way = dict[str, float](), dict[str, float](), dict[str, float]()
    in_kernels, collectives, kernels, sorts = 0.0, 0, 0, 0
    gathers = dict[str, float]()
    for each in module.computations[module.entry]:
        stage = next((name for name in STAGES if f"/{name}/" in f"{each.op_name}/"), "rest")
        exchange = _exchange(each, devices)
        if each.opcode.endswith("-done") and (end := under_way.pop(each.operands[0], None)) is not None:
            waited += max(0.0, end - time)
            time = max(time, end)
        elif each.opcode.endswith("-done") and (end := gathers.pop(each.operands[0], None)) is not None:
            others[stage] = others.get(stage, 0.0) + max(0.0, end - time)
            time = max(time, end)
        elif each.opcode == "call-update" and each.name.startswith("gather"):
            gathers[each.name] = time + 2 * each.arrays[-1].nbytes / chip.bytes_per_s
        elif exchange is not None:
            begin = max(time, link)
            link = begin + exchange.seconds(topology, devices)
            exchanged += link - begin
            collectives += 1
            if each.opcode.endswith(("-start", "-update")):
                under_way[each.name] = link
            else:
                waited += link - time
                time = link
        elif _KERNEL.search(each.op_name) and each.opcode == "custom-call":
            kernels += 1
            if _STATED.search(each.op_name):
                flops, nbytes = each.stated
                seconds = max(flops / (_KERNEL_RATE * chip.flops["bfloat16"]), nbytes / chip.bytes_per_s)
                in_kernels, time = in_kernels + seconds, time + seconds
        elif each.opcode == "sort":
            sorts += 1
        elif each.opcode not in ("conditional", "while"):
            spent = products if module.multiplies(each) else others
            spent[stage] = spent.get(stage, 0.0) + each.cycles / clock
            time += each.cycles / clock
    sampling = max(_branch_cycles(module, "/sample/"), default=0) / clock
    return StepTime(products, others, in_kernels, exchanged, waited, kernels, sorts, collectives, sampling)


def _exchange(each: Instruction, devices: int) -> _Exchange | None:
    """Return the collective that an instruction runs or starts, or that is fused into it."""
    largest = max((array.nbytes for array in each.arrays), default=0)
    if each.opcode in ("call-update", "custom-call-start"):  # on SparseCores
        kind = next((kind for kind in _KINDS if each.name.startswith(kind)), None)
        return _Exchange(kind, largest) if kind else None  # it has the operand and the result
    if (kind := each.opcode.removesuffix("-start")) in _KINDS and kind != each.opcode:
        return _Exchange(kind, largest)
    if each.opcode in _KINDS:
        return _Exchange(each.opcode, largest * (devices if each.opcode == "reduce-scatter" else 1))
    if each.opcode == "fusion" and any(name.startswith("all-reduce-scatter") for name in each.calls):
        return _Exchange("reduce-scatter", largest * devices)
    return None


def _branch_cycles(module: Module, scope: str) -> Iterator[int]:
    """Yield the cycles of each branch of the outermost conditionals in a scope, their loops run once."""
    for each in module.computations[module.entry]:
        if each.opcode == "conditional" and scope in f"{each.op_name}/":
            for branch in each.calls:
                yield sum(inner.cycles for inner in module.instructions(branch))
