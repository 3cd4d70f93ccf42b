"""Text of the report, for people to read and to paste into issues. Its own words are ASCII; lines have 100 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence

from sgl_jax.observability.log import size
from sgl_jax.tools.environment.facts import CompileCache, Device, Facts, Machine, Package, Probe, Report
from sgl_jax.tools.environment.verdicts import kinds

_WIDTH = 100
_MOST_DEVICES = 64  # listed one by one for a platform


def render(report: Report) -> str:
    facts = report.facts
    sections = (
        ("Platforms", _platforms(report)),
        ("Worth knowing", [line for notice in report.notices for line in _then("  - ", notice)]),
        ("Devices", _table(_devices(facts))),
        ("What was tried", _table((probe.platform, _how_it_went(probe)) for probe in facts.probes)),
        ("Packages (version, needed)", _table(map(_package, facts.packages))),
        ("Accelerators as the system shows them", _table(_accelerators(facts))),
        ("Machine", _table(_machine(facts.machine))),
        ("Limits (soft, hard)", _table(_limits(facts.machine))),
        ("Compile cache", _table(_compile_cache(facts.compile_cache))),
        ("Environment variables", _table(facts.environ.items()) or ["  none of those that matter is set"]),
    )
    usable = ", ".join(platform.upper() for platform in report.usable) or "no platform"
    parts = [f"sgl_jax {report.sgl_jax} on {facts.machine.hostname}\nUsable: {usable}"]
    parts += ["\n".join((title, *lines)) for title, lines in sections if lines]
    return "\n\n".join(parts) + "\n"


def _platforms(report: Report) -> list[str]:
    lines = []
    for verdict in report.verdicts:
        state = "usable" if verdict.usable else "not usable"
        lines += _wrapped(f"  {verdict.platform.upper()}  {state:<10}  ", verdict.summary)
        for advice in verdict.advice:
            lines += _then(" " * 19 + "-> ", advice)
    return lines


def _then(start: str, text: str) -> list[str]:
    """Wrap a text, but not the command that may follow in a line of its own: it is there to be copied."""
    text, _, command = text.partition("\n")
    return [*_wrapped(start, text), *([" " * len(start) + command] if command else [])]


def _devices(facts: Facts) -> Iterator[tuple[str, str, str]]:
    for probe in facts.probes:
        for device in probe.devices[:_MOST_DEVICES]:
            yield f"{probe.platform}:{device.id}", device.kind, ", ".join(_place(device, probe))
        if (more := len(probe.devices) - _MOST_DEVICES) > 0:
            yield probe.platform, f"and {more} more", ""


def _place(device: Device, probe: Probe) -> Iterator[str]:
    if probe.process_count > 1:
        yield f"process {device.process_index}"
    if device.coords:
        yield f"chip {','.join(map(str, device.coords))}"
    if device.core_on_chip is not None:
        yield f"core {device.core_on_chip}"
    if device.slice_index is not None:
        yield f"slice {device.slice_index}"
    if device.memory:
        yield f"{size(device.memory)} for jax, {size(device.memory_used or 0)} used"


def _how_it_went(probe: Probe) -> str:
    if probe.outcome == "not started":
        return f"not tried: {probe.message}"
    text = f"{probe.outcome} after {probe.seconds} s in a process of its own"
    if probe.outcome != "ok":
        return f"{text}, {probe.stage}: {probe.words}"
    process = f"process {probe.process_index} of {probe.process_count}"
    return f"{text}; jax {probe.jax_version}, runtime {probe.runtime}, {process}"


def _package(package: Package) -> tuple[str, str, str]:
    version = package.version or ("-" if package.optional else "MISSING")
    return package.name, version, package.needs if package.fits else f"{package.needs} <- does not fit"


def _accelerators(facts: Facts) -> Iterator[tuple[str, str]]:
    tpus, gpus = facts.tpus, facts.gpus
    yield "TPU chips (PCI)", kinds(tpus.chips) or "none"
    yield "TPU device files", ", ".join(tpus.nodes) or "none"
    yield "NVIDIA GPUs (PCI)", str(gpus.on_pci or "none")
    yield "GPU device files", ", ".join(gpus.nodes) or "none"
    if gpus.nvidia:
        yield "NVIDIA driver", gpus.driver or "none loaded"
    yield "nvidia-smi", kinds(gpus.names) or gpus.nvidia_smi


def _machine(machine: Machine) -> Iterator[tuple[str, str]]:
    cpus, memory = machine.cgroup_cpus, machine.cgroup_memory
    yield "system", machine.system
    yield "python", machine.python
    yield "CPU", machine.cpu_model
    yield "CPUs", f"{machine.cpus or 'unknown'}{f', limited to {cpus:g} by the container' if cpus else ''}"
    limited = f", limited to {size(memory)} by the container" if memory else ""
    yield "memory", f"{size(machine.memory) if machine.memory else 'unknown'}{limited}"
    yield "container", machine.container or "none seen"


def _limits(machine: Machine) -> Iterator[tuple[str, ...]]:
    for name, limits in machine.limits.items():
        show = size if "memory" in name else str
        yield name, *("no limit" if each is None else show(each) for each in limits)


def _compile_cache(cache: CompileCache) -> Iterator[tuple[str, str]]:
    if cache.path:
        yield "folder", f"{cache.path} ({cache.source})"
        yield "state", f"{cache.state}: {cache.problem}" if cache.problem else cache.state
        yield "free on its disk", "unknown" if cache.free is None else size(cache.free)


def _table(rows: Iterable[Sequence[str]]) -> list[str]:
    """Align the rows' columns, and wrap the last one."""
    rows = [tuple(row) for row in rows]
    if not rows:
        return []
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    lines = []
    for row in rows:
        start = "".join(f"  {cell:<{width}}" for cell, width in zip(row, widths, strict=False))
        lines += _wrapped(f"{start}  ", row[-1])
    return lines


def _wrapped(start: str, text: str) -> list[str]:
    text = " ".join(text.split())
    lines = textwrap.wrap(text, max(_WIDTH - len(start), 40), break_long_words=False, break_on_hyphens=False)
    indented = "\n".join(lines).replace("\n", "\n" + " " * len(start))
    return [line.rstrip() for line in f"{start}{indented}".splitlines()]
