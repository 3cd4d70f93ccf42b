"""`python -m sgl_jax.compile` as a user runs it, for a TPU that is not here."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


def test_every_program_of_a_launch_is_compiled_and_none_kept(stories260k: Path, tmp_path: Path) -> None:
    """The cache would keep programs that only a TPU can read back, and later runs would complain."""
    cache, report = tmp_path / "cache", tmp_path / "report.json"
    command = [sys.executable, "-m", "sgl_jax.compile", "--topology", "v6e-1", "--model-path", str(stories260k)]
    command += ["--max-running-requests", "8", "--chunked-prefill-size", "16", "--json", str(report)]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    programs = json.loads(report.read_text())["programs"]
    assert {program["name"] for program in programs} == {
        *("tokens=8 rows=8", "tokens=16 rows=8"),
        *("load pages", "load counts", "load bias", "load mask"),
    }
    assert all(program["code_bytes"] > 0 for program in programs)
    assert not cache.exists() or list(cache.iterdir()) == []
