"""Reader of a compiled program, from the text of XLA's final, scheduled module.

It reads the parts that decide speed and memory: which instructions run, in which loop or branch, how large their results
are, which of them communicate, and how long the TPU compiler expects each to take.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

_BITS = {f"{sign}{bits}": bits for sign in "su" for bits in (4, 8, 16, 32, 64)}
_BITS |= {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64}
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)")
_CALLED = re.compile(r"(?:body|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_NO_ESTIMATE = 2**63 - 1
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_PRODUCTS = ("convolution", "dot")
_NO_WORK = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}


@dataclasses.dataclass(frozen=True)
class Array:
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        bits = 8 if self.dtype.startswith("f8") else _BITS.get(self.dtype, 0)
        return -(-self.size * bits // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    arrays: tuple[Array, ...]  # the result, or its parts
    operands: tuple[str, ...]  # names of the operand instructions; for a parameter, its number
    calls: tuple[str, ...]  # computations it runs; a fusion's own counts as part of it
    op_name: str  # the path of named scopes it comes from
    cycles: int  # the TPU compiler's estimate; 0: none
    stated: tuple[int, int] = (0, 0)  # floating-point operations and bytes that a kernel of ours says it takes
    in_loop: bool = False
    in_branch: bool = False

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)

    @property
    def collective(self) -> str | None:
        """The collective that it is or starts; None: it is another instruction. A v7x runs some on its SparseCores, as
        custom calls that keep the name; there the end of the call counts, since it has the result."""
        kind = self.opcode.removesuffix("-start")
        if self.opcode in ("custom-call-done", "call-done"):
            kind = next((kind for kind in _COLLECTIVES if self.name.startswith(kind)), "")
        return kind if kind in _COLLECTIVES else None


@dataclasses.dataclass(frozen=True)
class Module:
    computations: dict[str, tuple[Instruction, ...]]
    entry: str
    aliased: tuple[tuple[int, int], ...]  # (output, parameter) pairs in the same memory

    def instructions(self, computation: str | None = None, *, in_loop=False, in_branch=False) -> Iterator[Instruction]:
        """Yield each instruction that runs once, those of loops and branches included; a fusion counts as one."""
        for each in self.computations[computation or self.entry]:
            if each.opcode in _NO_WORK:
                continue
            yield dataclasses.replace(each, in_loop=in_loop, in_branch=in_branch)
            looped, branched = in_loop or each.opcode == "while", in_branch or each.opcode == "conditional"
            for called in each.calls if each.opcode != "fusion" else ():
                yield from self.instructions(called, in_loop=looped, in_branch=branched)

    def fused(self, instruction: Instruction) -> Iterator[Instruction]:
        """Yield the instructions that a fusion consists of, or the instruction itself if it is none."""
        if instruction.opcode != "fusion":
            yield instruction
            return
        for called in instruction.calls:
            for each in self.computations[called]:
                yield from self.fused(each)

    def multiplies(self, instruction: Instruction) -> bool:
        """Return whether it is a matrix product, or a fusion that contains one."""
        return any(each.opcode in _PRODUCTS for each in self.fused(instruction))

    def collectives(self) -> list[Instruction]:
        return [each for each in self.instructions() if each.collective]


def read(text: str) -> Module:
    """Read the text of `Compiled.as_text()`. Raises ValueError if it has no entry computation."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = None, None
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = computations.setdefault(match[2], [])
            entry = match[2] if match[1] else entry
        elif current is not None and (match := _INSTRUCTION.match(line)):
            current.append(_instruction(*match.groups()))
    if entry is None:
        raise ValueError("the text is no HLO module: it has no ENTRY computation")
    header = text.partition("\n")[0]
    aliases = re.findall(r"\{(\d*)\}: \((\d+), \{\}", header.partition("input_output_alias=")[2].partition("} }")[0])
    aliased = tuple((int(output or 0), int(parameter)) for output, parameter in aliases)
    return Module({name: tuple(each) for name, each in computations.items()}, entry, aliased)


def _instruction(name: str, result: str, opcode: str, rest: str) -> Instruction:
    shapes = _ARRAY.findall(re.sub(r"/\*.*?\*/|\{[^}]*\}", "", result))  # without comments and layouts
    arrays = tuple(Array(dtype, tuple(int(n) for n in sizes.split(",") if n)) for dtype, sizes in shapes)
    branches = _BRANCHES.search(rest)
    calls = _CALLED.findall(rest) + ([b.strip(" %") for b in branches[1].split(",")] if branches else [])
    op_name, cycles = re.search(r'op_name="([^"]*)"', rest), re.search(r'"estimated_cycles":"(\d+)"', rest)
    operands = re.findall(r"[\w.\-]+", re.sub(r"/\*.*?\*/", "", rest.partition(")")[0]))
    path, estimate = op_name[1] if op_name else "", int(cycles[1]) if cycles else 0
    estimate = 0 if estimate == _NO_ESTIMATE else estimate
    cost = re.search(r'"cost_estimate":\{"flops":"(\d+)".*?"bytes_accessed":"(\d+)"', rest)
    stated = (int(cost[1]), int(cost[2])) if cost else (0, 0)
    return Instruction(name, opcode, arrays, tuple(operands), tuple(calls), path, estimate, stated)
