"""Machines to judge: facts as the modules that look would find them."""

from __future__ import annotations

from typing import Any

from sgl_jax.tools.environment.facts import Facts, Machine, Package, Platform, Probe, Signs

OURS = Package("sgl-jax", "0.1.0")
JAX = Package("jax", "0.12.0.1", ">=0.11.2")
LIBTPU = Package("libtpu", "0.0.50.1", "==0.0.50.*")
CUDA13 = Package("jax-cuda13-plugin", "0.12.0.1", "<=0.12.0.1,>=0.12.0.1")
CUDA12 = Package("jax-cuda12-plugin", "0.12.0.1", "<=0.12.0.1,>=0.12.0.1")

GIB = 1 << 30
V5E = Signs(("TPU v5e",) * 4, ("/dev/vfio/0", "/dev/vfio/1"))
V5E_WORKS = Probe(
    "tpu",
    "ok",
    stage="computing",
    seconds=8.4,
    jax_version="0.12.0.1",
    runtime="PJRT C API\nTFRT TPU v5 lite",
    devices=("TPU v5 lite",) * 4,
    memory=16 * GIB,
)
H200 = Signs(("NVIDIA H200",), ("/dev/nvidia0", "/dev/nvidiactl"), "580.82.07")
H200_WORKS = Probe("gpu", "ok", devices=("NVIDIA H200",), memory=105 * GIB)
CPU = Machine(cpu_model="A Processor", cpus=4, memory=32 * GIB)
CPU_WORKS = Probe("cpu", "ok", seconds=1.5, stage="computing", jax_version="0.12.0.1", runtime="cpu", devices=("cpu",))


def failed(platform: Platform, message: str, stage: str = "initialising", **more: Any) -> Probe:
    return Probe(platform, "failed", message, stage, 2.0, **more)


def facts(*probes: Probe, packages: tuple[Package, ...] = (), **more: Any) -> Facts:
    """A machine with jax, whose CPU works and nothing else was tried, unless told otherwise."""
    known = {each.platform: each for each in (*Facts().probes, CPU_WORKS, *probes)}
    return Facts(packages=(OURS, JAX, *packages), probes=tuple(known.values()), **{"machine": CPU, **more})
