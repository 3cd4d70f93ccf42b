"""Versions of the packages that matter, against what the installed packages themselves say they need.

Reads only their metadata, imports none of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import metadata
from typing import NamedTuple

from sgl_jax.tools.environment.facts import GPU_PLUGIN, Package

OURS = "sgl-jax"


class Installed(NamedTuple):
    version: str | None
    requires: tuple[str, ...] = ()  # as in `libtpu==0.0.50.*; extra == "tpu"`


def installed(name: str) -> Installed:
    """Read a package's own metadata; broken metadata counts as none."""
    try:
        distribution = metadata.distribution(name)
        return Installed(distribution.version, tuple(distribution.requires or ()))
    except Exception:
        return Installed(None)


def collect(look_up: Callable[[str], Installed] = installed) -> tuple[Package, ...]:
    """Collect the packages that sgl_jax needs, in its own order, and those that jax and its GPU plugin need of an
    accelerator's."""
    try:
        from packaging.requirements import Requirement
    except ImportError:  # then versions are all there is to say
        return tuple(Package(name, look_up(name).version, needed_by=OURS) for name in ("jax", "jaxlib", "numpy"))
    rows: dict[str, Package] = {}

    def add(text: str, needed_by: str, optional: bool = False) -> None:
        requirement = Requirement(text)
        # lower limits first, as people write them
        needs = ",".join(sorted(map(str, requirement.specifier), key=lambda clause: clause.startswith("<")))
        version = look_up(requirement.name).version
        fits = version is None or requirement.specifier.contains(version, prereleases=True)
        if requirement.name not in rows or not fits:  # jaxlib has several: the one that is not met counts
            rows[requirement.name] = Package(requirement.name, version, needs, needed_by, optional, fits)

    ours = look_up(OURS).requires
    jax = [(Requirement(text).name, text) for text in look_up("jax").requires]
    for text in (text for text in ours or ("jax",) if not _extra(text)):
        add(text, OURS if ours else "")
        if Requirement(text).name == "jax":
            add(next((each for name, each in jax if name == "jaxlib"), "jaxlib"), "jax")
    libtpu = look_up("libtpu").version is not None
    for name, text in jax:
        if _extra(text) == "tpu" and (name == "libtpu" or (name == "jaxlib" and libtpu)):
            add(text, "jax", optional=name == "libtpu")
        if GPU_PLUGIN.fullmatch(name) and look_up(name).version:
            add(text, "jax", optional=True)
            for part in look_up(name).requires:
                if look_up(Requirement(part).name).version:
                    add(part, name, optional=True)
    for text in (text for text in ours if _extra(text) in ("bench", "tokamax", "transformers")):
        add(text, OURS, optional=True)
    return tuple(rows.values())


def _extra(requirement: str) -> str:
    """Return the extra that brings a requirement; empty: it is always needed."""
    match = re.search(r"""extra\s*==\s*["']([^"']+)""", requirement)
    return match[1] if match else ""
