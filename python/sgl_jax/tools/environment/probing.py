"""Trying platforms, each in a process of its own, so that nothing hangs and no running server is disturbed."""

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

from sgl_jax.tools.environment.facts import Facts, Outcome, Platform, Probe

TIMEOUT_S = 90.0  # a TPU host alone takes up to half a minute
_GRACE_S = 5.0  # for a killed process to go; one that is stuck in the kernel does not
_SCRIPT = Path(__file__).with_name("probe.py")


def reason_not_to(platform: Platform, facts: Facts) -> str:
    """Return why trying this platform would tell nothing, or do harm; empty: try it."""
    if platform == "tpu":
        if not (facts.version("libtpu") or "TPU_LIBRARY_PATH" in facts.environ):
            return "libtpu is not installed"
        if not (facts.tpus.visible or "JAX_FORCE_TPU_INIT" in facts.environ):
            return "no chip is visible, and libtpu would lock out others for nothing"
    if platform == "gpu" and not facts.gpu_plugin:
        return "no GPU plugin of jax is installed"
    return ""


def variables(platform: Platform, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a probe: it keeps to one platform and little memory, and lets libtpu lock the TPU."""
    kept = {name: value for name, value in environ.items() if name != "ALLOW_MULTIPLE_LIBTPU_LOAD"}
    return kept | {"JAX_PLATFORMS": "cuda" if platform == "gpu" else platform, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


def probe(platform: Platform, facts: Facts, timeout_s: float, at_exit: contextlib.ExitStack) -> Probe:
    """Import jax, initialise the platform and compute on it, for `timeout_s` at most, unless `reason_not_to` says why not.

    Uses the packages, TPUs and variables in `facts`. Leaving `at_exit`, by Ctrl-C for example, ends the process if it
    still runs.
    """
    if reason := reason_not_to(platform, facts):
        return Probe(platform, "not started", reason)
    started = time.monotonic()
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", str(_SCRIPT), platform],  # -P: the script's own folder is not searched for modules
            env=variables(platform, facts.environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # ends with all that it started
        )
    except OSError as error:
        return Probe(platform, "not started", f"the process could not be started: {error}")
    at_exit.callback(_kill, process)
    outcome: Outcome = "ok"
    message = ""
    try:
        output, errors = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        outcome, message = "timeout", f"no answer in {timeout_s:g} s"
        _kill(process)
        output, errors = _last_words(process)
    found: dict[str, Any] = {}
    for line in output.splitlines():
        with contextlib.suppress(ValueError, TypeError):  # a line cut short by the kill
            found.update(json.loads(line))
    error, ok, log = found.pop("error", None), found.pop("ok", False), found.pop("log", ())
    if not ok and outcome == "ok":
        outcome, message = "failed", error
        if error is None:  # it could not tell; its last words may
            outcome, message = "crashed", _death(process.returncode)
            log = errors.decode(errors="replace").strip().splitlines()[-5:]
    devices = tuple(found.pop("devices", ()))
    seconds = round(time.monotonic() - started, 1)
    return Probe(platform, outcome, message, seconds=seconds, devices=devices, log=tuple(log), **found)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End it if it still runs, with its children: it leads a session of its own."""
    with contextlib.suppress(OSError):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def _last_words(process: subprocess.Popen[bytes]) -> tuple[bytes, bytes]:
    """Return the text that a killed process had written."""
    try:
        return process.communicate(timeout=_GRACE_S)
    except subprocess.TimeoutExpired as stuck:
        return stuck.stdout or b"", stuck.stderr or b""


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        names = {each.value: each.name for each in signal.Signals}
        return f"killed by {names.get(-code, f'signal {-code}')}"
    return f"ended with exit code {code} and said nothing"
