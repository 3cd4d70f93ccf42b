"""Trying a platform out: in a process of its own, bounded, whatever jax does there."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import pytest
from machines import CUDA13, H200, LIBTPU, V5E, facts

from messages import says
from sgl_jax.tools.environment.facts import Facts, Platform, Probe
from sgl_jax.tools.environment.probing import probe, reason_not_to, variables

# A jax of four TPU chips, as far as the probe looks.
FAKE_JAX = """
import logging
import os
from types import SimpleNamespace
__version__ = "0.12.0.1"
config = SimpleNamespace(update=lambda name, value: None)
client = SimpleNamespace(platform_version="a runtime")

def devices(platform):
    print("a library that prints")
    os.write(1, b"and one below Python")
    logging.getLogger("jax").warning("something odd")
    assert (platform, os.environ["JAX_PLATFORMS"]) == ("tpu", "tpu")
    memory = lambda: {"bytes_limit": 16 << 30, "bytes_in_use": 4096}
    return [SimpleNamespace(device_kind="TPU v5 lite", client=client, memory_stats=memory) for _ in range(4)]

local_devices = lambda backend: devices(backend)[:2]
process_count = lambda: 2
device_put = lambda array, device: array
jit = lambda function: function
"""


def with_jax(tmp_path: Path, source: str) -> dict[str, str]:
    """An environment in which `import jax` runs this."""
    (tmp_path / "jax.py").write_text(source)
    return {**os.environ, "PYTHONPATH": str(tmp_path)}


def probed(platform: Platform, environ: dict[str, str], timeout_s: float) -> Probe:
    """The probe of a machine with a TPU and libtpu, so that either platform is tried."""
    with contextlib.ExitStack() as at_exit:
        return probe(platform, facts(packages=(LIBTPU,), tpus=V5E, environ=environ), timeout_s, at_exit)


def test_the_cpu_of_this_machine() -> None:
    found = probed("cpu", {**os.environ, "JAX_PLATFORMS": "nonsense", "XLA_FLAGS": ""}, 120.0)
    assert (found.outcome, found.message, found.stage, found.runtime) == ("ok", "", "computing", "cpu")
    assert (found.devices, found.process_count, found.memory) == (("cpu",), 1, None)


def test_devices_of_all_processes_are_described(tmp_path: Path) -> None:
    found = probed("tpu", with_jax(tmp_path, FAKE_JAX), 60.0)
    assert (found.outcome, found.message) == ("ok", "")
    assert (found.jax_version, found.runtime, found.process_count) == ("0.12.0.1", "a runtime", 2)
    assert found.log == ("something odd", "something odd")
    assert (found.devices, found.memory) == (("TPU v5 lite",) * 4, 16 << 30)


def test_a_platform_that_counts_no_memory_works_all_the_same(tmp_path: Path) -> None:
    found = probed(
        "tpu", with_jax(tmp_path, FAKE_JAX.replace('{"bytes_limit": 16 << 30, "bytes_in_use": 4096}', "1 / 0")), 60.0
    )
    assert (found.outcome, found.memory) == ("ok", None)


def test_a_process_that_cannot_start_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/no/such/python")
    found = probed("cpu", {}, 60.0)
    assert found.outcome == "not started"
    assert says(found.message, "could not be started … /no/such/python")


def test_a_wrong_product_is_noticed(tmp_path: Path) -> None:
    source = FAKE_JAX.replace("lambda function: function", "lambda function: lambda x: x")
    found = probed("tpu", with_jax(tmp_path, source), 60.0)
    assert (found.outcome, found.stage) == ("failed", "computing")
    assert says(found.message, "ArithmeticError: … 128 … 1.0 … 1.0")


@pytest.mark.parametrize(
    ("source", "outcome", "stage", "message"),
    [
        (
            "raise ModuleNotFoundError(\"No module named 'jax'\")",
            "failed",
            "importing jax",
            "ModuleNotFoundError: No module named 'jax'",
        ),
        ("assert False", "failed", "importing jax", "AssertionError"),
        ("import sys; sys.exit(3)", "failed", "importing jax", "SystemExit: 3"),
        ("import os; os._exit(4)", "crashed", "importing jax", "exit code 4"),
        ("import os; os.kill(os.getpid(), 11)", "crashed", "importing jax", "killed by SIGSEGV"),
        (
            FAKE_JAX.replace("    print(", "    raise RuntimeError('No TPU\\nfound')\n    print("),
            "failed",
            "initialising",
            "RuntimeError: No TPU\nfound",
        ),
    ],
)
def test_failures_are_told_with_their_stage(
    tmp_path: Path, source: str, outcome: str, stage: str, message: str
) -> None:
    found = probed("tpu", with_jax(tmp_path, source), 60.0)
    assert (found.outcome, found.stage) == (outcome, stage)
    assert says(found.message, message)


def test_last_words_of_a_crash_are_kept(tmp_path: Path) -> None:
    source = "import os, sys; print('F0000 check failed', file=sys.stderr); sys.stderr.flush(); os.abort()"
    found = probed("tpu", with_jax(tmp_path, source), 60.0)
    assert (found.outcome, found.message, found.log) == ("crashed", "killed by SIGABRT", ("F0000 check failed",))


def has_ended(pid: str) -> bool:
    """Gone, or dead and waiting for its parent to notice."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True
    return state.rpartition(")")[2].split()[0] == "Z"


def test_one_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    pids.touch()
    source = (
        "import os, subprocess, time\n"
        "child = subprocess.Popen(['sleep', '100'])\n"
        f"open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}')\n"
        "time.sleep(100)\n"
    )
    found = probed("tpu", with_jax(tmp_path, source), 3.0)
    assert (found.outcome, found.message, found.stage) == ("timeout", "no answer in 3 s", "importing jax")
    deadline = time.monotonic() + 10  # a killed process may have to be given the CPU before it dies
    for pid in pids.read_text().split():
        while not has_ended(pid):
            assert time.monotonic() < deadline
            time.sleep(0.01)


REASONS = [
    ("cpu", facts(), ""),
    ("tpu", facts(tpus=V5E), "libtpu"),
    ("tpu", facts(packages=(LIBTPU,)), "chip … libtpu"),
    ("tpu", facts(packages=(LIBTPU,), environ={"JAX_FORCE_TPU_INIT": "1"}), ""),
    ("tpu", facts(packages=(LIBTPU,), tpus=V5E), ""),
    ("tpu", facts(tpus=V5E, environ={"TPU_LIBRARY_PATH": "/lib/libtpu.so"}), ""),
    ("gpu", facts(gpus=H200), "GPU plugin"),
    ("gpu", facts(packages=(CUDA13,)), ""),
]


@pytest.mark.parametrize(("platform", "given", "reason"), REASONS)
def test_what_cannot_work_or_would_disturb_is_not_tried(platform: Platform, given: Facts, reason: str) -> None:
    found = reason_not_to(platform, given)
    assert bool(found) == bool(reason)
    assert says(found, reason)


def test_a_probe_sees_one_platform_and_takes_little_of_it() -> None:
    environ = {"A": "1", "JAX_PLATFORMS": "tpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    common = {"A": "1", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    assert variables("tpu", environ) == {**common, "JAX_PLATFORMS": "tpu"}
    assert variables("gpu", environ) == {**common, "JAX_PLATFORMS": "cuda"}
