"""Versions of the packages that matter, against what the installed packages themselves say they need.

Reads only their metadata, imports none of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from importlib import metadata
from typing import NamedTuple

from sgl_jax.environment.facts import Package, is_gpu_plugin

OURS = "sgl-jax"
_REQUIREMENT = re.compile(r"([A-Za-z0-9][\w.-]*)\s*(?:\[[^\]]*\])?\s*\(?([^;)]*)\)?\s*(?:;(.*))?")
_EXTRA = re.compile(r"""extra\s*==\s*["']([^"']+)""")
_CLAUSE = re.compile(r"(===|==|~=|!=|<=|>=|<|>)\s*([^\s,]+)")


class Requirement(NamedTuple):
    name: str
    needs: str  # version clauses, as in ">=0.11.2,<1"
    extra: str  # empty: always needed


class Installed(NamedTuple):
    version: str | None
    requirements: tuple[Requirement, ...] = ()


def installed(name: str) -> Installed:
    """Version and requirements by the package's own metadata; broken metadata counts as none."""
    try:
        distribution = metadata.distribution(name)
        return Installed(distribution.version, tuple(map(parse_requirement, distribution.requires or ())))
    except Exception:
        return Installed(None)


def parse_requirement(text: str) -> Requirement:
    """A requirement by the Python packaging standard. Of its marker only `extra` is read."""
    match = _REQUIREMENT.match(text.strip())
    if match is None:
        return Requirement(text.strip(), "", "")
    extra = _EXTRA.search(match[3] or "")
    clauses = [clause.strip() for clause in match[2].split(",") if clause.strip()]
    clauses.sort(key=lambda clause: clause.startswith("<"))  # lower limits first, as people write them
    return Requirement(match[1], ",".join(clauses), extra[1] if extra else "")


def fits(needs: str, version: str) -> bool:
    """Whether a version satisfies clauses like `>=0.11.2,<1` or `==0.0.50.*`. Suffixes (rc1, +cu13) are not compared."""
    return all(_clause_holds(operator, wanted, version) for operator, wanted in _CLAUSE.findall(needs))


def _clause_holds(operator: str, wanted: str, version: str) -> bool:
    have, want = _numbers(version), _numbers(wanted)
    if operator in ("==", "===", "!=") and wanted.endswith(".*"):
        return (have[: len(want)] == want) == (operator != "!=")
    if operator == "~=":  # at least this, and the same but for the last part
        return _padded(have, want) >= _padded(want, have) and have[: len(want) - 1] == want[:-1]
    have, want = _padded(have, want), _padded(want, have)
    return {
        "==": have == want,
        "===": have == want,
        "!=": have != want,
        "<=": have <= want,
        ">=": have >= want,
        "<": have < want,
        ">": have > want,
    }[operator]


def _numbers(version: str) -> tuple[int, ...]:
    release = re.match(r"\d+(?:\.\d+)*", version.rpartition("!")[2])
    return tuple(map(int, release[0].split("."))) if release else ()


def _padded(version: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    return version + (0,) * (len(other) - len(version))


def collect(look_up: Callable[[str], Installed] = installed) -> tuple[Package, ...]:
    """What sgl_jax needs, in its own order; then what jax and its GPU plugin need, as far as it is an accelerator's."""
    ours, jax = look_up(OURS), look_up("jax")
    rows: dict[str, Package] = {}

    def add(name: str, needs: str, needed_by: str, optional: bool) -> None:
        version = look_up(name).version
        rows[name] = Package(name, version, needs, needed_by, optional, version is None or fits(needs, version))

    for requirement in ours.requirements:
        if not requirement.extra:
            add(requirement.name, requirement.needs, OURS, False)
        if requirement.name == "jax" and "jaxlib" not in rows:  # next to jax, before the others
            add("jaxlib", _jaxlib_needs(jax, look_up), "jax", False)
    if not ours.requirements:  # run from a folder that was not installed
        add("jax", "", "", False)
        add("jaxlib", _jaxlib_needs(jax, look_up), "jax", False)
    for requirement in jax.requirements:
        if requirement.name == "libtpu":
            add("libtpu", requirement.needs, "jax", True)
        if is_gpu_plugin(requirement.name) and (plugin := look_up(requirement.name)).version:
            add(requirement.name, requirement.needs, "jax", True)
            for part in plugin.requirements:
                if look_up(part.name).version:
                    add(part.name, part.needs, requirement.name, True)
    for requirement in ours.requirements:
        if requirement.extra in ("bench", "transformers") and requirement.name not in rows:
            add(requirement.name, requirement.needs, f"{OURS}[{requirement.extra}]", True)
    return tuple(rows.values())


def _jaxlib_needs(jax: Installed, look_up: Callable[[str], Installed]) -> str:
    """jax takes a range of jaxlibs; with an accelerator's package beside it, only one."""
    ranges = {r.extra: r.needs for r in jax.requirements if r.name == "jaxlib"}
    for requirement in _accelerator_packages(jax.requirements):
        if requirement.extra in ranges and look_up(requirement.name).version:
            return ranges[requirement.extra]
    return ranges.get("", "")


def _accelerator_packages(requirements: Iterable[Requirement]) -> Iterable[Requirement]:
    return (r for r in requirements if r.name == "libtpu" or is_gpu_plugin(r.name))
