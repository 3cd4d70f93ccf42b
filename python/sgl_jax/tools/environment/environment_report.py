"""Text of the report, for people to read and to paste into issues. Its own words are ASCII; lines have 100 columns."""

import textwrap
from collections.abc import Iterable, Iterator

from sgl_jax.observability.log import size
from sgl_jax.tools.environment.facts import Facts, Package, Probe, Report, kinds

_WIDTH = 100


def render(report: Report) -> str:
    """Return the report: a line about what is usable, then sections of lines; an empty section is left out."""
    facts = report.facts
    sections = (
        ("Platforms", _platforms(report)),
        ("Worth knowing", [line for notice in report.notices for line in _then("  - ", notice)]),
        ("What was tried", _table((probe.platform, _how_it_went(probe)) for probe in facts.probes)),
        ("Packages (needed)", _table((each.name, _package(each)) for each in facts.packages)),
        ("Machine", _table(_machine(facts))),
        ("Environment variables", _table(facts.environ.items()) or ["  none of those that matter is set"]),
    )
    usable = ", ".join(platform.upper() for platform in report.usable) or "no platform"
    parts = [f"sgl_jax {report.sgl_jax} on {facts.machine.hostname}\nUsable: {usable}"]
    parts += ["\n".join((title, *lines)) for title, lines in sections if lines]
    return "\n\n".join(parts)


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


def _how_it_went(probe: Probe) -> str:
    if probe.outcome == "not started":
        return f"not tried: {probe.message}"
    text = f"{probe.outcome} after {probe.seconds} s in a process of its own"
    if probe.outcome != "ok":
        return f"{text}, {probe.stage}: {probe.words}"
    return f"{text}; jax {probe.jax_version}, runtime {probe.runtime}"


def _package(package: Package) -> str:
    needed = f" ({package.needs})" if package.needs else ""
    return f"{package.version or 'MISSING'}{needed}{'' if package.fits else ' does not fit'}"


def _machine(facts: Facts) -> Iterator[tuple[str, str]]:
    machine, tpus, gpus = facts.machine, facts.tpus, facts.gpus
    cpus, memory = machine.cgroup_cpus, machine.cgroup_memory
    yield "system", machine.system
    yield "python", machine.python
    yield "CPU", machine.cpu_model
    yield "CPUs", f"{machine.cpus or 'unknown'}{f', limited to {cpus:g} by the container' if cpus else ''}"
    limited = f", limited to {size(memory)} by the container" if memory else ""
    yield "memory", f"{size(machine.memory) if machine.memory else 'unknown'}{limited}"
    yield "container", "yes" if machine.in_container else "none seen"
    for name, signs in (("TPUs", tpus), ("NVIDIA GPUs", gpus)):
        yield name, kinds(signs.names) or "none on the PCI bus"
        yield f"{name}' files", ", ".join(signs.nodes) or "none"
    yield "NVIDIA driver", gpus.driver or "none loaded"


def _table(rows: Iterable[tuple[str, str]]) -> list[str]:
    """Align names and texts, and wrap the texts."""
    rows = list(rows)
    width = max((len(name) for name, _ in rows), default=0)
    return [line for name, text in rows for line in _wrapped(f"  {name:<{width}}  ", text)]


def _wrapped(start: str, text: str) -> list[str]:
    """Lay a text out after `start`, its further lines below its first."""
    indent, text = " " * len(start), " ".join(text.split())
    lines = textwrap.wrap(text, max(_WIDTH - len(start), 40), break_long_words=False, break_on_hyphens=False)
    return [f"{indent if number else start}{line}".rstrip() for number, line in enumerate(lines or [""])]
