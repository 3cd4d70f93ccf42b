"""Times of a step from the text of a program."""

from __future__ import annotations

import pytest

from sgl_jax.planning import hlo
from sgl_jax.planning.step_time import step_time
from sgl_jax.planning.topology import parse

V6E = parse("v6e-4")
CLOCK = 1.7509e9
SIZE = 1024 * 4096 * 2  # bytes of an exchanged array
HALF_RING = SIZE / V6E.all_reduce_bytes_per_s(4) / 2 + 2e-6  # and two hops


def program(*lines: str) -> hlo.Module:
    text = "HloModule jit_step, is_scheduled=true\n\n"
    text += "%fused (p: bf16[8,8]) -> bf16[8,8] {\n  ROOT %d.1 = bf16[8,8]{1,0} convolution(%p, %p)\n}\n\n"
    text += (
        "%all-reduce-scatter (p: bf16[1024,4096]) -> bf16[256,4096] {\n  ROOT %s = bf16[256,4096]{1,0} copy(%p)\n}\n\n"
    )
    text += '%branch (q: f32[2]) -> f32[2] {\n  ROOT %g = f32[2]{0} negate(%q), backend_config={"estimated_cycles":"1751"}\n}\n\n'
    return hlo.read(text + "ENTRY %main (a: f32[2]) -> f32[2] {\n" + "\n".join(lines) + "\n}\n")


def product(cycles: int) -> str:
    config = f'backend_config={{"estimated_cycles":"{cycles}"}}'
    return f'  %f = bf16[8,8]{{1,0}} fusion(%a), kind=kOutput, calls=%fused, metadata={{op_name="jit(s)/mlp/dot"}}, {config}'


def started(name: str) -> list[str]:
    whole, part = "bf16[1024,4096]{1,0}", "bf16[256,4096]{1,0}"
    return [
        f"  %{name}.call-start = ((), (), (s32[1])) call-start(), to_apply=%called",
        f"  %{name}.call-update = (({part}), {whole}) call-update(%{name}.call-start, %a)",
    ]


def done(name: str) -> str:
    return f"  %{name}.call-done = bf16[1024,4096]{{1,0}} call-done(%{name}.call-update)"


NORM = '  %n = bf16[8]{0} fusion(%a), kind=kLoop, calls=%x, metadata={op_name="jit(s)/mlp/norm"}, backend_config={"estimated_cycles":"1751"}'


def test_what_runs_in_turn_adds_up() -> None:
    all_reduce = '  %psum = bf16[1024,4096]{1,0} all-reduce(%a), channel_id=1, metadata={op_name="jit(s)/mlp/psum"}'
    module = program(product(175100), all_reduce, NORM.replace("calls=%x", "calls=%branch"))
    time = step_time(module, V6E, 4)
    assert time.products == pytest.approx({"mlp": 1e-4}, rel=1e-3)
    assert time.others == pytest.approx({"mlp": 1e-6}, rel=1e-3)
    assert time.waited == time.exchanged == pytest.approx(2 * HALF_RING)
    assert time.seconds == pytest.approx(1e-4 + 1e-6 + 2 * HALF_RING, rel=1e-3)


@pytest.mark.parametrize("cycles", [1751, 1751000])
def test_a_collective_runs_beside_what_stands_before_its_end(cycles: int) -> None:
    time = step_time(program(*started("all-gather.1"), product(cycles), done("all-gather.1")), V6E, 4)
    assert time.exchanged == pytest.approx(HALF_RING)
    assert time.waited == pytest.approx(max(0.0, HALF_RING - cycles / CLOCK), rel=1e-2)


def test_any_form_of_a_start_and_its_end_is_known() -> None:
    plain = [
        "  %all-gather-start = (bf16[256,4096]{1,0}, bf16[1024,4096]{1,0}) all-gather-start(%a)",
        "  %all-gather-done = bf16[1024,4096]{1,0} all-gather-done(%all-gather-start)",
    ]
    custom = [
        "  %all-gather.3 = (bf16[256,4096]{1,0}, bf16[1024,4096]{1,0}) custom-call-start(%a)",
        "  %all-gather.4 = bf16[1024,4096]{1,0} custom-call-done(%all-gather.3)",
    ]
    for lines in (plain, custom):
        time = step_time(program(lines[0], product(1751), lines[1]), V6E, 4)
        assert (time.collectives, time.waited) == (1, pytest.approx(HALF_RING - 1e-6, rel=1e-3))


def test_the_links_carry_one_at_a_time() -> None:
    names = ("all-gather.1", "reduce-scatter.2")
    time = step_time(program(*started(names[0]), *started(names[1]), *map(done, names)), V6E, 4)
    assert time.waited == pytest.approx(2 * HALF_RING)


def test_a_scatter_inside_a_fusion_is_waited_for() -> None:
    time = step_time(program("  %f = bf16[256,4096]{1,0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter"), V6E, 4)
    assert (time.waited, time.collectives) == (pytest.approx(HALF_RING), 1)


def test_a_kernel_of_products_takes_what_it_states() -> None:
    stated = 'backend_config={"custom_call_config":{"cost_estimate":{"flops":"918000000","transcendentals":"0","bytes_accessed":"BYTES"}}}'
    kernel = (
        f'  %k = bf16[8]{{0}} custom-call(%a), metadata={{op_name="jit(s)/mlp/experts_down/pallas_call"}}, {stated}'
    )
    for nbytes, seconds in ((0, 1e-6 / 0.9), (3_280_000, 2e-6)):
        time = step_time(program(kernel.replace("BYTES", str(nbytes))), V6E, 4)
        assert (time.kernels, time.in_kernels, time.seconds) == (1, pytest.approx(seconds), time.in_kernels)


def test_a_gather_on_sparse_cores_is_waited_for_and_a_sort_counted() -> None:
    lines = [
        "  %gather_offload.1 = ((), (), (s32[1])) call-start(), to_apply=%called",
        "  %gather_offload.1.update = ((bf16[99,4096], s32[1024]), bf16[1024,4096]) call-update(%gather_offload.1, %a, %a)",
        '  %done = bf16[1024,4096]{1,0} call-done(%gather_offload.1.update), metadata={op_name="jit(s)/embed/gather"}',
        "  %s = (s32[8], s32[8]) sort(%a, %a), dimensions={0}",
    ]
    copied = 2 * SIZE / 1640e9
    time = step_time(program(*lines), V6E, 4)
    assert (time.others, time.sorts) == ({"embed": pytest.approx(copied), "rest": 0.0}, 1)
    time = step_time(program(*lines[:2], product(1751), *lines[2:]), V6E, 4)
    assert time.others["embed"] == pytest.approx(copied - 1e-6, rel=1e-3)


def test_kernels_and_the_samplers_branches_are_kept_apart() -> None:
    kernel = '  %k = bf16[8]{0} custom-call(%a), metadata={op_name="jit(s)/attention/fa_chunks/pallas_call"}'
    branches = "branch_computations={%branch, %branch}"
    sampler = f'  %c = f32[2]{{0}} conditional(%p, %a, %a), {branches}, metadata={{op_name="jit(s)/sample/cond"}}'
    time = step_time(program(kernel, sampler), V6E, 4)
    assert (time.kernels, time.seconds) == (1, 0.0)
    assert time.sampling == pytest.approx(1e-6, rel=1e-3)
