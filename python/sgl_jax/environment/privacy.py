"""What may be pasted into a public issue: no secrets, no home directory."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "(set, hidden)"

# Variables that change what jax, the accelerators' runtimes, downloads or this program do.
_MATTER = re.compile(
    r"(JAX|XLA|LIBTPU|TPU|CLOUD_TPU|MEGASCALE|PJRT|CUDA|NVIDIA|NCCL|ROCR|HIP|HF|HUGGING_?FACE|SGL_JAX|OMP|TF_CPP)_\w+"
    r"|SLURM_(JOB_ID|NNODES|NTASKS|PROCID|JOB_NODELIST|STEP_NODELIST)|OMPI_COMM_WORLD_\w+"  # where jax finds a cluster
    r"|ALLOW_MULTIPLE_LIBTPU_LOAD|LD_LIBRARY_PATH|LD_PRELOAD|PYTHONPATH|XDG_CACHE_HOME|TMPDIR"
)
_SECRET_NAME = re.compile(r"TOKEN|KEY|SECRET|PASS|CREDENTIAL|AUTH")
_SECRET_VALUES = (
    (re.compile(r"\bhf_\w{8,}"), "hf_(hidden)"),
    (re.compile(r"\b(sk-[\w-]{8,}|gh[pousr]_\w{8,}|AKIA\w{8,})"), "(hidden)"),
    (re.compile(r"(\w+://)[^/\s@]+@"), r"\1(hidden)@"),  # user and password in an address
)


def variables(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that matter, by name; values that may be secrets are replaced."""
    return {
        name: HIDDEN if value and _SECRET_NAME.search(name.upper()) else value
        for name, value in sorted(environ.items())
        if _MATTER.fullmatch(name)
    }


def without_secrets(value: Any, home: str) -> Any:
    """The same dataclass, list, dict or text, with the home directory as ~ and without what looks like a secret."""
    if isinstance(value, str):
        return _clean(value, home)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = {f.name: without_secrets(getattr(value, f.name), home) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **changed)
    if isinstance(value, Mapping):
        return {name: without_secrets(each, home) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(without_secrets(each, home) for each in value)
    return value


def _clean(text: str, home: str) -> str:
    for pattern, replacement in _SECRET_VALUES:
        text = pattern.sub(replacement, text)
    if len(home.rstrip("/")) > 1:
        text = re.sub(r"(?<![\w.-])" + re.escape(home.rstrip("/")) + r"(?![\w.-])", "~", text)
    return text
