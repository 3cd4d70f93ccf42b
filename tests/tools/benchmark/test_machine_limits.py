"""The file of limits: what measure_limits writes is what the other tools read, and what does not fit is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scripted_run import COST, LIMITS

from sgl_jax import measure_limits
from sgl_jax.planning import machine_rates
from sgl_jax.planning.machine_rates import Probe
from sgl_jax.tools.benchmark.machine_limits import server_roofline
from sgl_jax.tools.benchmark.terminal import BenchmarkError


def test_what_is_measured_is_printed_written_and_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine_rates, "_CPU", Probe(1 << 20, 1, 128, 1))  # the real one takes 2 s and 1 GiB
    file = tmp_path / "limits.json"
    flags = ["--device", "cpu", "--num-devices", "1", "--dtype", "float32"]
    assert measure_limits.main([*flags, "--output", str(file)]) == 0
    roofline = server_roofline(file, COST | {"device_kind": "cpu", "num_devices": 1, "dtype": "float32"})
    assert roofline is not None
    limits = roofline.machine_limits
    assert limits.memory_gb_per_s > 0 < limits.matmul_tflop_per_s
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:3] == [
        "Device:                                  1 x cpu   ",
        f"Memory bandwidth (GB/s):                 {limits.memory_gb_per_s:<10.2f}",
    ]


def test_a_model_and_a_file_make_a_roofline(tmp_path: Path) -> None:
    file = tmp_path / "limits.json"
    file.write_text(json.dumps(LIMITS))
    roofline = server_roofline(file, COST)
    assert roofline is not None
    assert roofline.shares(None, None, None, 1, 0)["machine_limits"] == LIMITS
    assert server_roofline(None, None) is None
    with pytest.raises(BenchmarkError, match="--machine-limits: the server does not tell its model's cost"):
        server_roofline(file, None)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "sgl_jax.measure_limits did not write it: .*No such file or directory"),
        ("{}", "sgl_jax.measure_limits did not write it"),
        (json.dumps(LIMITS), "whose num_devices is 2; the server's is 4"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path: Path, content: str | None, said: str) -> None:
    file = tmp_path / "limits.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(BenchmarkError, match=f"--machine-limits is .*limits.json[;,] {said}"):
        server_roofline(file, COST | {"num_devices": 4, "dtype": "bfloat16"})


def test_what_cannot_be_measured_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert measure_limits.main(["--device", "cpu", "--num-devices", "4096"]) == 2
    assert capsys.readouterr().err.startswith("measure_limits: error: the launch needs 4096 devices")
    assert measure_limits.main(["--output", "/none/x"]) == 2
    assert "--output is /none/x; it must be a file in a folder that exists" in capsys.readouterr().err
