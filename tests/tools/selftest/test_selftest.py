"""The self-test: it passes here, and says so when a kernel is wrong."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from messages import says
from sgl_jax import check_env
from sgl_jax.ops.attention.backends import find_backend
from sgl_jax.ops.grouped_matmul import native
from sgl_jax.planning.machine_rates import Rates
from sgl_jax.planning.topology import CHIPS, chip_of
from sgl_jax.runtime.platform import PLATFORMS, pick_devices
from sgl_jax.tools.environment import check_command
from sgl_jax.tools.environment.facts import Facts, Report
from sgl_jax.tools.selftest import numerics, run, speed
from sgl_jax.tools.selftest.numerics import Check
from sgl_jax.tools.selftest.speed import LARGE, ON_CPU, StepTime, shape_for


def test_every_kernel_of_this_machine_passes_and_others_say_where_they_run() -> None:
    platform, devices = pick_devices("cpu")
    found = {check.name: check for check in numerics.checks(platform, devices[:1])}
    assert all(check.passed for check in found.values())
    assert [name for name, check in found.items() if check.error is None] == [
        "attention fa, bfloat16",
        "attention fa, float32",
    ]
    assert says(found["attention fa, float32"].note, "tpu … cpu")
    assert {"attention native, float32", "grouped matmul, bfloat16", "sampler"} <= set(found)


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


def test_a_wrong_sampler_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = numerics.sampler.sample
    monkeypatch.setattr(numerics.sampler, "sample", lambda *args: (right(*args) + 1) % 500)
    assert numerics.sampler_error(8, 500) == 1.0

    def elsewhere(logits, lines, state):
        return right(logits, dataclasses.replace(lines, position=lines.position + 1), state)

    monkeypatch.setattr(numerics.sampler, "sample", elsewhere)
    assert numerics.sampler_error(8, 500) > 0.01


def test_a_check_that_raises_or_gives_no_number_has_failed() -> None:
    def broken() -> float:
        raise RuntimeError("Mosaic failed\nlong")

    raised = numerics._run("x", 1.0, "float32", broken)
    assert (raised.passed, run.check_line(raised)) == (False, f"  FAILED  {'x':30s} RuntimeError: Mosaic failed")
    assert not numerics._run("x", 1.0, "float32", lambda: float("nan")).passed


def test_the_sum_over_devices_is_exact() -> None:
    assert numerics.sum_error(jax.devices("cpu")) == 0


def test_lines_name_shares_of_what_the_maker_says_where_he_is_known() -> None:
    rates, chip = Rates(1312e9, 459e12), CHIPS["v6e"]
    pinned = (
        "memory … 1312 GB/s … 80% … 1640 GB/s",
        "bfloat16 … 459 TFLOP/s … 50% … 918 TFLOP/s",
        "Qwen3-8B … 64 rows … 1024 tokens … --tp-size 4 … 4.00 ms",
        "2.00 ms … 50%",
        "1.60 ms … 40%",
    )
    steps = speed.step_lines(StepTime(LARGE, 4, 0.004, 4 * 1312e9 * 0.002), rates, chip)
    lines = [*speed.rate_lines(rates, chip, "bfloat16"), *steps]
    assert [says(line, each) for line, each in zip(lines, pinned, strict=True)] == [True] * 5
    assert "%" not in (line := speed.rate_lines(rates, None, "bfloat16")[0])
    assert says(line, "memory … 1312 GB/s")
    assert len(speed.step_lines(StepTime(ON_CPU, 1, 0.1, 1e9), rates, None)) == 2


@pytest.mark.parametrize(
    ("kind", "chip"),
    [("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v6 lite", "v6e"), ("TPU7x", "v7x"), ("NVIDIA H200", "h200")],
)
def test_a_device_tells_its_chip(kind: str, chip: str) -> None:
    assert chip_of(kind) is CHIPS[chip]
    assert chip_of("NVIDIA T4") is None


def test_the_shape_is_one_that_fits() -> None:
    class Device:
        platform, device_kind = "tpu", "TPU v5 lite"

        def memory_stats(self):
            return {"bytes_limit": 16 << 30}

    assert shape_for(PLATFORMS["cpu"], [Device()]) is ON_CPU
    assert shape_for(PLATFORMS["tpu"], [Device()]).model == "Qwen3-0.6B"
    assert shape_for(PLATFORMS["tpu"], [Device()] * 4) is LARGE


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

    monkeypatch.setattr(run, "selftest", selftest)
    monkeypatch.setattr(check_command, "check_env", lambda timeout: report("gpu", "cpu"))
    assert check_env.main(["--selftest"]) == 1
    assert check_env.main(["--selftest", "--platform", "cpu"]) == 0
    assert check_env.main(["--selftest", "--platform", "tpu"]) == 1  # not usable: nothing to test
    assert check_env.main([]) == 0
    assert tested == ["gpu", "cpu"]
    assert "in ~ok" in capsys.readouterr().out


def test_the_whole_of_it_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "checks", lambda platform, devices: iter([Check("one", 0.5, 1.0)]))
    monkeypatch.setattr(speed, "device_rates", lambda *_: Rates(1e10, 1e11))
    lines: list[str] = []
    platforms = jax.config.jax_platforms
    try:
        assert run.selftest("cpu", lines.append)
    finally:
        jax.config.update("jax_platforms", platforms)
    text = "\n".join(lines)
    assert f"  ok      {'one':30s} 0.5, 1 allowed" in text
    assert says(text, "Qwen3-0.6B … 2 layers … 8 rows … 64 tokens … --tp-size 1")
    assert lines[-1].startswith("\nAll passed, in ")
    assert np.isfinite(float(text.rpartition("--tp-size 1: ")[2].partition(" ms")[0]))
