"""The self-test: it passes here, and says so when a kernel is wrong."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu

from messages import says
from sgl_jax import check_env
from sgl_jax.ops.attention.backends import find_backend
from sgl_jax.ops.experts import pallas_tpu
from sgl_jax.ops.grouped_matmul import native
from sgl_jax.runtime.platform import PLATFORMS, dense_for
from sgl_jax.tools.environment import check_command
from sgl_jax.tools.environment.facts import Facts, Report
from sgl_jax.tools.selftest import numerics
from sgl_jax.tools.selftest.numerics import Check


def test_every_kernel_of_this_machine_passes_and_others_say_where_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numerics, "model_error", lambda platform, num_devices: 0.01 * num_devices)
    monkeypatch.setattr(numerics, "dense_for", {"cpu": ("those", "of", "a TPU")}.get)
    monkeypatch.setattr(numerics, "dense_error", lambda *dense: 0.0 if dense[2] == "a TPU" else 1.0)
    monkeypatch.setattr(numerics, "routed_experts_for", {"cpu": "those of a TPU"}.get)
    monkeypatch.setattr(numerics, "experts_error", lambda routed, dtype: 0.0 if routed == "those of a TPU" else 1.0)
    found = {check.name: check for check in numerics.checks(PLATFORMS["cpu"], 2)}
    assert all(check.passed for check in found.values())
    assert [name for name, check in found.items() if check.error is None] == [
        "attention fa, bfloat16",
        "attention fa, float32",
    ]
    assert says(found["attention fa, float32"].note, "tpu … cpu")
    assert {
        "attention native, float32",
        "grouped matmul, bfloat16",
        "experts, bfloat16",
        "dense layers, bfloat16",
    } <= set(found)
    assert found["model, bfloat16"].error == 0.02


def test_a_wrong_attention_is_found() -> None:
    right = find_backend("native", "cpu", vectorise=False)

    def off(*args):
        *arrays, layer = args
        spec = dataclasses.replace(layer.spec, scale=1.2 * layer.spec.scale)
        return right(*arrays, dataclasses.replace(layer, spec=spec))

    def forgets(*args):  # the new KV of one token
        out, kv = right(*args)
        return out, kv.at[-1].set(0)

    for wrong in (off, forgets):
        assert numerics.attention_error(dataclasses.replace(right, attend=wrong), "float32") > 0.1


def test_a_wrong_grouped_matmul_is_found() -> None:
    def shifted(x, w, layer, sizes):
        return native.grouped_matmul(x, w, layer, jnp.roll(sizes, 1))

    assert numerics.grouped_matmul_error(shifted, "float32") > 0.1


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dense_layers_pass_as_they_are_and_wrong_ones_are_found(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pltpu, "get_tpu_info", type("Chip", (), {"vmem_capacity_bytes": 128 << 20}))
    right = dense_for("tpu")
    assert right is not None
    product, gated_product, norms = right

    def found(*dense) -> float:
        with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
            return numerics.dense_error(*dense, dtype)

    def shifted(function):
        return lambda *args, **options: jnp.roll(function(*args, **options), 1, axis=-1)

    assert found(*right) < numerics.ALLOWED[dtype]
    assert found(shifted(product), gated_product, norms) > 0.1
    assert found(product, gated_product, dataclasses.replace(norms, norm=shifted(norms.norm))) > 0.1
    off = lambda *args: (args[0], norms.added_norm(*args)[1])  # noqa: E731
    assert found(product, gated_product, dataclasses.replace(norms, added_norm=off)) > 0.1
    if dtype == "bfloat16":
        assert found(product, shifted(gated_product), norms) > 0.1


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_experts_pass_as_they_are_and_wrong_ones_are_found(dtype: str) -> None:
    def run(x, gate_up, down, layer, expert, weights, gated, num_experts, *, shift=0):
        with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
            moved = jnp.roll(expert, shift, axis=0)
            arguments = x, gate_up, down, layer, moved, weights, gated, num_experts
            return pallas_tpu.routed_experts(*arguments, blocks=pallas_tpu.Blocks(128, 1 << 20))

    assert numerics.experts_error(run, dtype) < numerics.ALLOWED[dtype]
    assert numerics.experts_error(functools.partial(run, shift=1), dtype) > 0.1


def test_a_model_decodes_as_it_reads_unless_attention_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    assert numerics.model_error("cpu", 1) < numerics.ALLOWED["bfloat16"]
    right = find_backend("native", "cpu", vectorise=False)

    def forgets(q, k, v, kv, batch, layer):
        short = jnp.arange(batch.page_table.shape[0]) < batch.num_short
        pages = jnp.where(short[:, None], batch.page_table[:, ::-1], batch.page_table)  # the history is elsewhere
        return right(q, k, v, kv, dataclasses.replace(batch, page_table=pages), layer)

    wrong = dataclasses.replace(right, attend=forgets)
    monkeypatch.setattr("sgl_jax.runtime.platform.find_backend", lambda *args, **more: wrong)
    assert numerics.model_error("cpu", 1) > numerics.ALLOWED["bfloat16"]


def test_a_check_that_raises_or_gives_no_number_has_failed() -> None:
    def broken() -> float:
        raise RuntimeError("Mosaic failed\nlong")

    raised = numerics._run("x", 1.0, "float32", broken)
    assert (raised.passed, numerics.check_line(raised)) == (False, f"  FAILED  {'x':30s} RuntimeError: Mosaic failed")
    assert not numerics._run("x", 1.0, "float32", lambda: float("nan")).passed


def report(*usable: str) -> Report:
    from sgl_jax.tools.environment.facts import Verdict

    verdicts = tuple(Verdict(name, name in usable, "") for name in ("tpu", "gpu", "cpu"))
    return Report("0", verdicts, (), Facts())


def test_the_command_tests_the_best_usable_platform(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    tested = []

    def selftest(platform, say):
        tested.append(platform)
        say("in ~ok")
        return platform == "cpu"

    monkeypatch.setattr(numerics, "selftest", selftest)
    monkeypatch.setattr(check_command, "check_env", lambda timeout: report("gpu", "cpu"))
    assert check_env.main(["--selftest"]) == 1
    assert check_env.main(["--selftest", "--platform", "cpu"]) == 0
    assert check_env.main(["--selftest", "--platform", "tpu"]) == 1  # not usable: nothing to test
    assert check_env.main([]) == 0
    assert tested == ["gpu", "cpu"]
    assert "in ~ok" in capsys.readouterr().out


def test_each_check_has_a_line_and_the_last_says_whether_all_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [Check("one", 0.5, 1.0), Check("two", note="it runs on tpu, not on cpu")]
    monkeypatch.setattr(numerics, "checks", lambda platform, num_devices: iter(found))
    lines: list[str] = []
    platforms = jax.config.jax_platforms
    try:
        assert numerics.selftest("cpu", lines.append)
        found.append(Check("three", 1.5, 1.0))
        assert not numerics.selftest("cpu", lines.append)
    finally:
        jax.config.update("jax_platforms", platforms)
    assert says(lines[0], "x cpu")
    assert lines[1:3] == [
        f"  ok      {'one':30s} 0.5, 1 allowed",
        f"  not run {'two':30s} it runs on tpu, not on cpu",
    ]
    assert lines[3].startswith("All passed, in ")
    assert lines[-2] == f"  FAILED  {'three':30s} 1.5, 1 allowed"
    assert lines[-1].startswith("FAILED, in ")
