"""Reading a compiled program: what XLA made of it, from the text of its final, scheduled module.

Only what decides speed and memory is read: which instructions run, in which loop or branch, how large their results are,
what goes between devices, and what the TPU compiler expects each to take.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

_BITS = {
    "pred": 8,
    "s4": 4,
    "u4": 4,
    "s8": 8,
    "u8": 8,
    "s16": 16,
    "u16": 16,
    "s32": 32,
    "u32": 32,
    "s64": 64,
    "u64": 64,
}
_BITS |= {"bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64}
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)")
_CALLED = re.compile(r"(?:body|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
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
    arrays: tuple[Array, ...]  # of the result
    operands: tuple[str, ...]  # names of the instructions it takes; of a parameter its number
    calls: tuple[str, ...]  # computations it runs; a fusion's is part of it
    op_name: str  # the path of named scopes it comes from
    cycles: int  # the TPU compiler's estimate; 0: none
    in_loop: bool = False
    in_branch: bool = False

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)

    @property
    def collective(self) -> str | None:
        """Which collective it is or starts. A v7x has some run by its SparseCores, as custom calls that keep the name;
        there it is the end of the call, which has the result."""
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
        """All that run, those of loops and branches included, each once; not what is inside a fusion."""
        for each in self.computations[computation or self.entry]:
            if each.opcode in _NO_WORK:
                continue
            yield dataclasses.replace(each, in_loop=in_loop, in_branch=in_branch)
            if each.opcode != "fusion":
                inside = {
                    "in_loop": in_loop or each.opcode == "while",
                    "in_branch": in_branch or each.opcode == "conditional",
                }
                for called in each.calls:
                    yield from self.instructions(called, **inside)

    def fused(self, instruction: Instruction) -> Iterator[Instruction]:
        """The instructions that a fusion is made of, and itself if it is none."""
        if instruction.opcode != "fusion":
            yield instruction
        for called in instruction.calls if instruction.opcode == "fusion" else ():
            for each in self.computations[called]:
                yield from self.fused(each)

    def collectives(self) -> list[Instruction]:
        return [each for each in self.instructions() if each.collective]


def read(text: str) -> Module:
    """The module of `Compiled.as_text()`. Raises ValueError if it has no entry computation."""
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
    return Module(
        {name: tuple(each) for name, each in computations.items()},
        entry,
        tuple((int(a or 0), int(b)) for a, b in aliases),
    )


def _instruction(name: str, result: str, opcode: str, rest: str) -> Instruction:
    arrays = tuple(
        Array(dtype, tuple(int(n) for n in sizes.split(",") if n))
        for dtype, sizes in _ARRAY.findall(_no_layout(result))
    )
    branches = _BRANCHES.search(rest)
    calls = _CALLED.findall(rest) + ([b.strip(" %") for b in branches[1].split(",")] if branches else [])
    op_name, cycles = re.search(r'op_name="([^"]*)"', rest), re.search(r'"estimated_cycles":"(\d+)"', rest)
    operands = re.findall(r"[\w.\-]+", re.sub(r"/\*.*?\*/", "", rest.partition(")")[0]))
    estimate = int(cycles[1]) if cycles else 0
    return Instruction(
        name,
        opcode,
        arrays,
        tuple(operands),
        tuple(calls),
        op_name[1] if op_name else "",
        estimate if estimate < 1 << 62 else 0,  # the largest number stands for "no estimate"
    )


def _no_layout(result: str) -> str:
    return re.sub(r"\{[^}]*\}", "", re.sub(r"/\*.*?\*/", "", result))
