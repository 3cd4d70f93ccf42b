"""Versions of the packages that matter, against what sgl_jax and jax say they need. Reads metadata, imports none."""

import re
from collections.abc import Callable
from importlib import metadata

from sgl_jax.tools.environment.facts import GPU_PLUGIN, Package

OURS = "sgl-jax"

type Installed = tuple[str | None, list[str]]  # version, and requirements as in `libtpu==0.0.50.*; extra == "tpu"`


def installed(name: str) -> Installed:
    """Read a package's own metadata; broken metadata counts as none."""
    try:
        distribution = metadata.distribution(name)
        return distribution.version, distribution.requires or []
    except Exception:
        return None, []


def collect(look_up: Callable[[str], Installed] = installed) -> tuple[Package, ...]:
    """Collect sgl_jax, the packages that it always needs, in its own order, and jaxlib. libtpu and a GPU plugin follow
    if they are installed."""
    version, requires = look_up(OURS)
    ours = [text for text in requires if "extra ==" not in text]
    rows = {OURS: Package(OURS, version)}
    for text in (*ours, "jax", *look_up("jax")[1], "jaxlib"):
        match = re.match(r"([\w.-]+)[^<>=!~;]*([^;]*)", text)
        name, needs = (match[1], match[2].strip()) if match else (text, "")
        version = look_up(name)[0]
        accelerator = version and (name == "libtpu" or GPU_PLUGIN.fullmatch(name))
        if name not in rows and (text in ours or name in ("jax", "jaxlib") or accelerator):
            rows[name] = Package(name, version, needs, version is None or _fits(version, needs))
    return tuple(rows.values())


def _fits(version: str, needs: str) -> bool:
    try:
        from packaging.specifiers import SpecifierSet

        return SpecifierSet(needs).contains(version, prereleases=True)
    except (ImportError, ValueError):  # not installed, or broken metadata: then versions are all there is to say
        return True
