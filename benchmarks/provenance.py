"""Origin of a result: the commit and the machine."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

import sgl_jax
from sgl_jax.tools.environment.machine import look

PACKAGE = Path(sgl_jax.__file__).parent


def commit() -> str | None:
    """Return the commit of the repository the package is run from, with "+" when its files were changed; None outside of one."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(PACKAGE), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # the repository is ours, not one we are installed in
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def machine() -> dict[str, Any]:
    """Describe the machine this program runs on, the server's as well when it was started here."""
    found = look({})
    return {"cpu": found.cpu_model, "cores": found.cpus, "system": platform.system()}
