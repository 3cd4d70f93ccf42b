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

from sgl_jax.tools.environment.facts import IMPORTING, Device, Facts, Outcome, Platform, Probe

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
    if platform == "gpu" and not facts.gpu_plugin:
        return "no GPU plugin of jax is installed"
    return ""


def variables(platform: Platform, environ: Mapping[str, str], gpu_name: str = "cuda") -> dict[str, str]:
    """The environment of a probe: keeps it to one platform and little memory, and lets libtpu lock the TPU."""
    kept = {name: value for name, value in environ.items() if name != "ALLOW_MULTIPLE_LIBTPU_LOAD"}
    name = gpu_name if platform == "gpu" else platform
    return kept | {"JAX_PLATFORMS": name, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


def try_out(platform: Platform, environ: Mapping[str, str], timeout_s: float, at_exit: contextlib.ExitStack) -> Probe:
    """Import jax, initialise the platform and compute on it, with the variables `environ` and a bound on its time.

    Leaving `at_exit`, by Ctrl-C for example, ends the process if it still runs.
    """
    started = time.monotonic()
    process = subprocess.Popen(
        # -P: the script's own folder is not searched for modules.
        [sys.executable, "-P", str(_SCRIPT), platform],
        env=dict(environ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # ends with all that it started
    )
    at_exit.callback(_kill, process)
    outcome: Outcome = "ok"
    message = ""
    try:
        output, errors = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        outcome, message = "timeout", f"no answer in {timeout_s:g} s"
        _kill(process)
        output, errors = _last_words(process)
    found = _merged(output)
    error = found.pop("error", None)
    if not found.pop("ok", False) and outcome == "ok":
        if error is not None:
            outcome, message = "failed", error
        else:  # it could not tell; its last words may
            outcome, message = "crashed", _death(process.returncode)
            found["log"] = errors.decode(errors="replace").strip().splitlines()[-5:]
    found["devices"] = tuple(map(_device, found.get("devices", ())))
    found["log"] = tuple(found.get("log", ()))
    seconds = round(time.monotonic() - started, 1)
    found.setdefault("stage", IMPORTING)
    return Probe(platform, outcome, message, seconds=seconds, **found)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """If it still runs, with its children: it leads a session of its own."""
    with contextlib.suppress(OSError):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def _last_words(process: subprocess.Popen[bytes]) -> tuple[bytes, bytes]:
    """The text that a killed process had written."""
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


def _device(found: dict[str, Any]) -> Device:
    return Device(**found | {"coords": found["coords"] and tuple(found["coords"])})


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        names = {each.value: each.name for each in signal.Signals}
        return f"killed by {names.get(-code, f'signal {-code}')}"
    return f"ended with exit code {code} and said nothing"
