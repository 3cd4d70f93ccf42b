"""Machines to judge: facts as the modules that look would find them."""

from __future__ import annotations

from typing import Any

from sgl_jax.tools.environment.facts import Device, Facts, Gpus, Machine, Package, Platform, Probe, Tpus

JAX = Package("jax", "0.12.0.1", ">=0.11.2", "sgl-jax")
LIBTPU = Package("libtpu", "0.0.50.1", "==0.0.50.*", "jax", optional=True)
CUDA13 = Package("jax-cuda13-plugin", "0.12.0.1", ">=0.12.0.1,<=0.12.0.1", "jax", optional=True)
CUDA12 = Package("jax-cuda12-plugin", "0.12.0.1", ">=0.12.0.1,<=0.12.0.1", "jax", optional=True)
ROCM = Package("jax-rocm7-plugin", "0.12.0.1", "==0.12.0.1.*", "jax", optional=True)

GIB = 1 << 30
V5E = Tpus(chips=("TPU v5e",) * 4, nodes=("/dev/vfio/0", "/dev/vfio/1"))
V5E_DEVICES = tuple(
    Device(2 * y + x, "TPU v5 lite", memory=16 * GIB, memory_used=GIB, coords=(x, y, 0), core_on_chip=0, slice_index=0)
    for y in range(2)
    for x in range(2)
)
H200 = Gpus(
    nodes=("/dev/nvidia0", "/dev/nvidiactl"),
    on_pci=1,
    driver="580.82.07",
    nvidia_smi="ok",
    names=("NVIDIA H200",),
)
CPU = Machine(cpu_model="A Processor", cpus=4, memory=32 * GIB)
CPU_WORKS = Probe(
    "cpu", "ok", seconds=1.5, stage="computing", jax_version="0.12.0.1", runtime="cpu", devices=(Device(0, "cpu"),)
)


def failed(platform: Platform, message: str, stage: str = "initialising", **more: Any) -> Probe:
    return Probe(platform, "failed", message, stage, 2.0, **more)


def facts(*probes: Probe, packages: tuple[Package, ...] = (), **more: Any) -> Facts:
    """A machine with jax, whose CPU works unless told otherwise."""
    given = {probe.platform for probe in probes}
    cpu = () if "cpu" in given else (CPU_WORKS,)
    return Facts(packages=(JAX, *packages), probes=(*probes, *cpu), **{"machine": CPU, **more})
