"""The report as text, to be read by people and pasted into issues: plain ASCII of our own, 100 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from sgl_jax.environment.facts import Advice, Facts, Limit, Package, Probe, Report
from sgl_jax.environment.wording import count, kinds, words
from sgl_jax.observability.log import size

_WIDTH = 100
_MOST_DEVICES = 64  # listed one by one


def render(report: Report) -> str:
    facts = report.facts
    sections = (
        ("Platforms", _platforms(report)),
        ("Worth knowing", _notices(report)),
        ("Devices", _devices(facts)),
        ("What was tried", _table(_tried(facts))),
        ("Packages (version, needed)", _table(map(_package, facts.packages))),
        ("Accelerators as the system shows them", _table(_accelerators(facts))),
        ("Machine", _table(_machine(facts))),
        ("Limits (soft, hard)", _table(map(_limit, facts.machine.limits))),
        ("Compile cache and disks", _table(_storage(facts))),
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
        lines += _advice(verdict.advice, 19)
    return lines


def _notices(report: Report) -> list[str]:
    lines = []
    for notice in report.notices:
        lines += [*_wrapped("  - ", notice.text), *_advice(notice.advice, 4)]
    return lines


def _advice(advice: Sequence[Advice], indent: int) -> list[str]:
    lines = []
    for each in advice:
        lines += _wrapped(" " * indent + "-> ", each.text + (":" if each.command else ""))
        if each.command:  # never wrapped: it is there to be copied
            lines.append(" " * (indent + 3) + each.command)
    return lines


def _devices(facts: Facts) -> list[str]:
    rows, hidden = [], 0
    for probe in facts.probes:
        hidden += max(0, len(probe.devices) - _MOST_DEVICES)
        for device in probe.devices[:_MOST_DEVICES]:
            place = [f"process {device.process_index}"] if probe.process_count > 1 else []
            if device.coords:
                place.append(f"chip {','.join(map(str, device.coords))}")
            if device.core_on_chip is not None:
                place.append(f"core {device.core_on_chip}")
            if device.slice_index is not None:
                place.append(f"slice {device.slice_index}")
            if device.memory:
                place.append(f"{size(device.memory)} for jax, {size(device.memory_used or 0)} used")
            rows.append((f"{probe.platform}:{device.id}", device.kind, ", ".join(place)))
    return _table(rows) + ([f"  and {hidden} more"] if hidden else [])


def _tried(facts: Facts) -> Iterable[tuple[str, str]]:
    return ((probe.platform, _how_it_went(probe)) for probe in facts.probes)


def _how_it_went(probe: Probe) -> str:
    if probe.outcome == "not started":
        return f"not tried: {probe.message}"
    text = f"{probe.outcome} after {probe.seconds} s in a process of its own"
    if probe.outcome != "ok":
        return f"{text}, {probe.stage}: {words(probe)}"
    process = f"process {probe.process_index} of {probe.process_count}"
    return f"{text}; jax {probe.jax_version}, runtime {probe.runtime}, {process}"


def _package(package: Package) -> tuple[str, str, str]:
    version = package.version or ("-" if package.optional else "MISSING")
    return package.name, version, package.needs if package.fits else f"{package.needs} <- does not fit"


def _accelerators(facts: Facts) -> Iterable[tuple[str, str]]:
    tpus, gpus = facts.tpus, facts.gpus
    yield "TPU chips (PCI)", kinds(tpus.chips) or "none"
    yield "TPU device files", ", ".join(tpus.nodes) or "none"
    for holder in tpus.holders:
        yield "TPU in use by", f"process {holder.pid} ({holder.name}), {holder.node}"
    if tpus.visible and tpus.huge_pages:
        yield "transparent huge pages", tpus.huge_pages
    yield "NVIDIA GPUs (PCI)", str(gpus.nvidia_on_pci or "none")
    yield "GPU device files", ", ".join(gpus.nodes) or "none"
    if gpus.nvidia:
        yield "NVIDIA driver", gpus.driver or "none loaded"
    yield "nvidia-smi", gpus.nvidia_smi
    for gpu in gpus.gpus:
        used = f"{_size(gpu.memory)}, {_size(gpu.memory_used)} used"
        yield "", f"{gpu.name}, {used}, compute capability {gpu.compute_capability or 'unknown'}"


def _machine(facts: Facts) -> Iterable[tuple[str, str]]:
    machine = facts.machine
    yield "system", machine.system
    yield "python", f"{machine.python}, {machine.executable}"
    yield "CPU", machine.cpu_model
    limited = f", limited to {machine.cgroup_cpus:g} by the container" if machine.cgroup_cpus else ""
    yield "CPUs", f"{machine.cpus or 'unknown'}, {machine.cpus_allowed or 'unknown'} for this process{limited}"
    yield "instruction sets", ", ".join(machine.instruction_sets) or "unknown"
    limited = f", limited to {size(machine.cgroup_memory)} by the container" if machine.cgroup_memory else ""
    yield "memory", f"{_size(machine.memory)}, {_size(machine.memory_available)} available{limited}"
    yield "/dev/shm", _size(machine.shared_memory)
    yield "container", machine.container or "none seen"


def _limit(limit: Limit) -> tuple[str, str, str]:
    def shown(value: int | None) -> str:
        if value is None:
            return "no limit"
        return size(value) if limit.unit == "bytes" else str(value)

    return limit.name, shown(limit.soft), shown(limit.hard)


def _storage(facts: Facts) -> Iterable[tuple[str, str]]:
    if (cache := facts.compile_cache) is not None:
        yield "compile cache", f"{cache.path} ({cache.source})"
        yield (
            "",
            {
                "ready": f"{count(cache.programs, 'program')}, {size(cache.size)}, can be written",
                "will be made": "is not there yet, can be made",
                "remote": "remote, not looked at",
                "not writable": f"cannot be written: {cache.problem}",
            }[cache.state],
        )
    for disk in facts.disks:
        yield f"disk of the {disk.use}", f"{_size(disk.free)} free of {_size(disk.total)} ({disk.path})"


def _size(num_bytes: int | None) -> str:
    return "unknown" if num_bytes is None else size(num_bytes)


def _table(rows: Iterable[Sequence[str]]) -> list[str]:
    """Columns one under the other, the last one wrapped."""
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
