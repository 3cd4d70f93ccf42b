"""Reading a compiled program's text."""

from __future__ import annotations

import pytest

from sgl_jax.planning import hlo
from sgl_jax.planning.hlo import Array

TEXT = """HloModule jit_step, is_scheduled=true, input_output_alias={ {0}: (1, {}, may-alias), {1}: (3, {}, may-alias) }, x={}

%fused (p.1: bf16[8,4]) -> bf16[8,4] {
  %p.1 = bf16[8,4]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %t.9 = bf16[4,8]{0,1} transpose(%p.1), dimensions={1,0}
}

%body.3 (c: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %c = (s32[]{:T(128)}, bf16[8,4]{1,0}) parameter(0)
  %psum.1 = bf16[8,4]{1,0:T(8,128)(2,1)S(1)} all-reduce(%x), channel_id=1, to_apply=%add, metadata={op_name="jit(step)/mlp/psum"}
  ROOT %r = (s32[]{:T(128)}, /*index=1*/bf16[8,4]{1,0}) tuple(%i, %psum.1)
}

%branch.7 (q: f32[2]) -> f32[2] {
  ROOT %g = f32[2]{0} all-gather-start(%q), backend_config={"estimated_cycles":"9223372036854775807"}
}

ENTRY %main (a: f32[2], b: bf16[8,4]) -> bf16[8,4] {
  %a = f32[2]{0} parameter(0)
  %w.2 = (s32[]{:T(128)}, bf16[8,4]{1,0}) while(%t), condition=%cond, body=%body.3
  %cc = f32[2]{0} conditional(%p, %a, %a), branch_computations={%branch.7, %branch.7}
  ROOT %f = bf16[8,4]{1,0} fusion(%a), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"2120"}
}
"""


def test_what_runs_where_and_how_large_it_is() -> None:
    module = hlo.read(TEXT)
    assert module.entry == "main"
    assert module.aliased == ((0, 1), (1, 3))
    found = [(i.name, i.nbytes, i.in_loop, i.in_branch) for i in module.instructions()]
    assert found == [
        ("w.2", 68, False, False),
        ("psum.1", 64, True, False),
        ("cc", 8, False, False),
        ("g", 8, False, True),
        ("g", 8, False, True),
        ("f", 64, False, False),  # and not the transpose inside it
    ]
    assert [i.arrays for i in module.instructions() if i.name == "w.2"] == [(Array("s32", ()), Array("bf16", (8, 4)))]


def test_collectives_are_known_by_their_starts_too() -> None:
    found = hlo.read(TEXT).collectives()
    assert [(i.collective, i.op_name) for i in found][:2] == [("all-reduce", "jit(step)/mlp/psum"), ("all-gather", "")]


def test_what_an_instruction_takes() -> None:
    module = hlo.read(TEXT)
    taken = {i.name: i.operands for i in module.computations["main"]}
    assert taken == {"a": ("0",), "w.2": ("t",), "cc": ("p", "a", "a"), "f": ("a",)}


def test_the_compilers_estimate_is_zero_where_it_has_none() -> None:
    assert {i.name: i.cycles for i in hlo.read(TEXT).instructions()} | {"f": 2120, "g": 0} == {
        "w.2": 0,
        "psum.1": 0,
        "cc": 0,
        "g": 0,
        "f": 2120,
    }


def test_a_text_without_entry_is_refused() -> None:
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.read("HloModule empty\n")


@pytest.mark.parametrize("dtype", ["pred", "s4", "f8e4m3fn", "bf16", "f32", "s64"])
def test_bytes_of_each_type(dtype: str) -> None:
    bits = {"pred": 8, "s4": 4, "f8e4m3fn": 8, "bf16": 16, "f32": 32, "s64": 64}[dtype]
    (instruction,) = hlo.read(
        f"HloModule m\n\nENTRY %e () -> x {{\n  %a = {dtype}[3,4]{{1,0}} copy(%b)\n}}\n"
    ).instructions()
    assert instruction.nbytes == 12 * bits // 8
