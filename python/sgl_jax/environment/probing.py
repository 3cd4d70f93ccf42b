"""Trying platforms out: which ones are worth it, and how to do it so that nothing hangs and no server is disturbed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sgl_jax.environment.facts import IMPORTING, Device, Facts, Outcome, Platform, Probe, gpu_family

TIMEOUT_S = 90.0  # a TPU host alone takes up to half a minute
_GRACE_S = 5.0  # for a killed process to go; one that is stuck in the kernel does not
_SCRIPT = Path(__file__).with_name("probe.py")


def reason_not_to(platform: Platform, facts: Facts) -> str:
    """Why trying this platform out would tell nothing, or do harm; empty: try it."""
    if platform == "tpu":
        if not (facts.version("libtpu") or "TPU_LIBRARY_PATH" in facts.environ):
            return "libtpu is not installed"
        if not (facts.tpus.visible or "JAX_FORCE_TPU_INIT" in facts.environ):
            return "no chip is visible, and libtpu would lock out others for nothing"
        if facts.tpus.holders:
            return "in use by another process, and a TPU serves one at a time"
    if platform == "gpu" and facts.gpu_plugin is None:
        return "no GPU plugin of jax is installed"
    return ""


def variables(platform: Platform, environ: Mapping[str, str], plugin: str | None) -> dict[str, str]:
    """The environment of a probe: keeps it to one platform and little memory, and lets libtpu lock the TPU."""
    kept = {name: value for name, value in environ.items() if name != "ALLOW_MULTIPLE_LIBTPU_LOAD"}
    family = gpu_family(plugin) if platform == "gpu" else platform
    return kept | {"JAX_PLATFORMS": family, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


class Processes:
    """Those of probes. Leaving its `with`, by Ctrl-C for example, ends the ones that still run."""

    def __init__(self) -> None:
        self._all: list[subprocess.Popen[bytes]] = []

    def add(self, process: subprocess.Popen[bytes]) -> None:
        self._all.append(process)

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self._all:
            if process.poll() is None:
                _kill(process)


def try_out(
    platform: Platform,
    environ: Mapping[str, str],
    timeout_s: float,
    plugin: str | None = None,
    processes: Processes | None = None,
) -> Probe:
    """Import jax, initialise the platform and compute on it, in a process with `environ` and a bound on its time."""
    started = time.monotonic()
    process = subprocess.Popen(
        # -P: the script's own folder is not searched for modules.
        [sys.executable, "-P", str(_SCRIPT), platform],
        env=variables(platform, environ, plugin),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # ends with all that it started
    )
    if processes is not None:
        processes.add(process)
    timed_out = False
    try:
        output, errors = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        timed_out = True
        _kill(process)
        output, errors = _last_words(process)
    return _read(
        platform, _merged(output), process.returncode, timed_out, timeout_s, time.monotonic() - started, errors
    )


def _kill(process: subprocess.Popen[bytes]) -> None:
    """With its children: it leads a session of its own."""
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)


def _last_words(process: subprocess.Popen[bytes]) -> tuple[bytes, bytes]:
    """What a killed process had written."""
    try:
        return process.communicate(timeout=_GRACE_S)
    except subprocess.TimeoutExpired as stuck:
        return stuck.stdout or b"", stuck.stderr or b""


def _merged(output: bytes) -> dict[str, Any]:
    """The JSON lines of a probe as one dict, later ones over earlier ones."""
    found: dict[str, Any] = {}
    for line in output.splitlines():
        with contextlib.suppress(ValueError, TypeError):  # a line cut short by the kill
            found.update(json.loads(line))
    return found


def _read(
    platform: Platform,
    found: Mapping[str, Any],
    code: int | None,
    timed_out: bool,
    timeout_s: float,
    seconds: float,
    errors: bytes,
) -> Probe:
    outcome: Outcome
    if timed_out:
        outcome, message = "timeout", f"no answer in {timeout_s:g} s"
    elif found.get("ok"):
        outcome, message = "ok", ""
    elif "error" in found:
        outcome, message = "failed", found["error"]
    else:
        outcome, message = "crashed", _death(code)
    log = tuple(found.get("log", ()))
    if outcome == "crashed":  # it could not tell; its last words may
        log = tuple(errors.decode(errors="replace").strip().splitlines()[-5:])
    return Probe(
        platform=platform,
        outcome=outcome,
        message=message,
        stage=found.get("stage", IMPORTING),
        seconds=round(seconds, 1),
        jax_version=found.get("jax_version", ""),
        runtime=found.get("runtime", ""),
        process_index=found.get("process_index", 0),
        process_count=found.get("process_count", 1),
        devices=tuple(map(_device, found.get("devices", ()))),
        log=log,
    )


def _device(found: Mapping[str, Any]) -> Device:
    values: dict[str, Any] = dict(found)
    if values["coords"] is not None:
        values["coords"] = tuple(values["coords"])
    return Device(**values)


def _death(code: int | None) -> str:
    names = {each.value: each.name for each in signal.Signals}
    if code is not None and code < 0:
        return f"killed by {names.get(-code, f'signal {-code}')}"
    return f"ended with exit code {code} and said nothing"
