"""Where a result comes from: the command, the commit, the machine. Nothing secret is in it."""

from __future__ import annotations

import platform
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sgl_jax.settings.flags import HIDDEN
from sgl_jax.settings.server_args import FLAGS
from sgl_jax.tools.environment.machine import look

_SECRET = {option for flag in FLAGS if flag.about.secret for option in flag.options}


def command(module: str, argv: Sequence[str]) -> str:
    """As it can be run again, but for API keys and the values of headers."""
    shown, option = [], ""
    for word in argv:
        name, equals, value = word.partition("=")
        if word.startswith("-"):
            option = name
            if option in _SECRET and equals:
                word = f"{name}={HIDDEN}"
        elif option in _SECRET:
            word = HIDDEN
        elif option == "--header" and value:
            word = f"{name}={HIDDEN}"
        shown.append(word)
    return shlex.join(["python", "-m", module, *shown])


def commit() -> str | None:
    """The commit of the repository this package is run from, with "+" when its files were changed; None outside of one."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # the repository is ours, not one we are installed in
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--", "..") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def machine() -> dict[str, Any]:
    """The one this program runs on, the server's as well when it was started here."""
    found = look({})
    return {"cpu": found.cpu_model, "cores": found.cpus, "system": platform.system()}
