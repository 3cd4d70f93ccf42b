"""Devices and numbers in words, for verdicts and report alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from sgl_jax.environment.facts import Device, Probe
from sgl_jax.observability.log import size


def describe(devices: tuple[Device, ...]) -> str:
    """`4 x TPU v5 lite, 16.0 GiB each, 2x2x1 chips`, and what there is of hosts and slices."""
    parts = [kinds([device.kind for device in devices])]
    if memory := {device.memory for device in devices if device.memory}:
        parts.append(f"{size(min(memory))} for jax{' each' if len(devices) > 1 else ''}")
    if grid := topology(devices):
        parts.append(grid)
    for number, word in (
        (len({device.slice_index for device in devices}), "slice"),
        (len({device.process_index for device in devices}), "process"),
    ):
        if number > 1:
            parts.append(count(number, word))
    return ", ".join(parts)


def topology(devices: tuple[Device, ...]) -> str:
    """The chips of a slice as a grid, as `2x2x1 chips`, with their cores where a device is a core; "" without coords."""
    coords = [device.coords for device in devices if device.coords]
    if not coords:
        return ""
    sides = (max(axis) - min(axis) + 1 for axis in zip(*coords, strict=True))
    cores = len({device.core_on_chip for device in devices})
    return "x".join(map(str, sides)) + " chips" + (f" of {cores} cores" if cores > 1 else "")


def count(number: int, word: str) -> str:
    plural = {"process": "processes"}.get(word, f"{word}s")
    return f"{number} {word if number == 1 else plural}"


def kinds(names: Iterable[str]) -> str:
    """`4 x TPU v5e`, and what else there is."""
    return " and ".join(f"{number} x {name}" for name, number in sorted(Counter(names).items()))


def words(probe: Probe) -> str:
    """The error, and before it what jax had logged: a plugin that fails is logged, and then merely missing."""
    return " ".join("; ".join((*probe.log, probe.message)).split())
