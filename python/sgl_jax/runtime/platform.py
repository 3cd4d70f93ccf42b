"""Platforms, and the settings of each for what a user leaves open, from measurements."""

import dataclasses
import logging
from importlib import metadata
from pathlib import Path
from typing import Literal

import jax

from sgl_jax.models.decoder_config import DecoderConfig
from sgl_jax.observability import log
from sgl_jax.ops.adapter_addend import library_addend
from sgl_jax.ops.attention.backends import find_backend
from sgl_jax.ops.cpu.library import find_library
from sgl_jax.ops.dense.api import DenseProduct, GatedProduct, no_gated_product, plain_product
from sgl_jax.ops.dense.cpu_library import library_product
from sgl_jax.ops.experts.api import RoutedExperts
from sgl_jax.ops.grouped_matmul import native as grouped_native
from sgl_jax.ops.grouped_matmul.api import GroupedMatmul
from sgl_jax.ops.kernels import Kernels
from sgl_jax.ops.norm_rope import PLAIN_NORMS, Norms
from sgl_jax.ops.quantized_matmul.compiled import library_grouped_matmul, library_matmul
from sgl_jax.parallel.grid import Grid
from sgl_jax.runtime.control_groups import ROOT, read

logger = logging.getLogger(__name__)

Name = Literal["tpu", "gpu", "cpu"]  # in the order of --device, with which typing would mix up another


@dataclasses.dataclass(frozen=True, kw_only=True)
class Platform:
    """Settings of a kind of device."""

    name: Name
    dtype: str  # for models stored in bfloat16 or less
    page_size: int
    chunked_prefill_size: int
    max_running_requests: int
    smallest_bucket: dict[str, int]  # dtype -> tokens
    bucket_growth: int  # tokens of a bucket of decoding rows over those of the one below
    mem_fraction: float  # fraction of the device's memory for weights and KV
    max_pool_tokens: int | None  # limit of a default launch's KV pool
    stacks_layers: bool  # scan over stacked layers; else unroll a list of them
    vectorises_rows: bool  # native attention computes decoding rows side by side; else one after the other
    ridge_tokens: int  # tokens of a step whose products take as long as reading the weights
    compiles_behind: bool  # ready with the programs that requests need; the others are compiled while it serves
    attention: str = "native"  # default attention backend
    ngram_drafts: int = 7  # drafts of n-grams that a step verifies in each row, where nobody says how many


PLATFORMS: dict[Name, Platform] = {
    # On CPUs a step's time follows its rows closely. The smallest bucket has two rows because in plain XLA one row in bfloat16
    # costs more than two (benchmarks/LOG.md). A scan
    # compiles three times faster but copies each layer's weights, which costs a decode step 30 % in bfloat16 and more in
    # float32. On TPU weights of a list are prefetched, weights of a scan are not (docs/decisions/0011-list-on-tpu.md). TPU's
    # smallest bucket in bfloat16 has the rows of a tile: padding fewer for the attention kernels costs three operations a layer.
    "cpu": Platform(
        name="cpu",
        dtype="bfloat16",
        page_size=16,
        chunked_prefill_size=256,
        max_running_requests=32,
        smallest_bucket={"float32": 1, "bfloat16": 2},
        bucket_growth=2,
        mem_fraction=0.4,
        max_pool_tokens=65536,
        stacks_layers=False,
        vectorises_rows=False,
        ridge_tokens=8,
        compiles_behind=True,
        attention="cpu",
        ngram_drafts=3,
    ),
    "gpu": Platform(
        name="gpu",
        dtype="bfloat16",
        page_size=16,
        chunked_prefill_size=2048,
        max_running_requests=256,
        smallest_bucket={"float32": 8, "bfloat16": 8},
        bucket_growth=4,
        mem_fraction=0.88,
        max_pool_tokens=None,
        stacks_layers=True,
        vectorises_rows=True,
        ridge_tokens=192,
        compiles_behind=False,
    ),
    "tpu": Platform(
        name="tpu",
        dtype="bfloat16",
        page_size=16,
        chunked_prefill_size=2048,
        max_running_requests=256,
        smallest_bucket={"float32": 8, "bfloat16": 16},
        bucket_growth=4,
        mem_fraction=0.88,
        max_pool_tokens=None,
        stacks_layers=False,
        vectorises_rows=True,
        ridge_tokens=512,
        compiles_behind=False,
        attention="fa",
    ),
}


def overlap_tokens(device_kind: str, model: DecoderConfig, grid: Grid) -> int:
    """Return the least tokens of a part of a step that is divided so that collectives run beside products; 0: none is.

    Only the compilers for v6e and v7x were seen to start such collectives and finish them later, for models without experts
    (docs/decisions/0036-long-steps-are-computed-in-parts.md). Each part reads all weights, which takes longer than the sums
    where experts have few tokens each. A v7x chip is two devices, between which data stay on the chip.
    """
    exchanges = device_kind.startswith("TPU v6") or (device_kind.startswith("TPU7x") and grid.tensor > 2)
    return 512 if exchanges and model.moe is None else 0


class NoDevice(ValueError):
    """The machine has no device of the kind asked for."""


def pick_devices(wanted: Name | None, number: int = 1) -> tuple[Platform, list[jax.Device]]:
    """Return `number` devices of the wanted platform, or of the best one present; with several processes, as many of each.
    Raises NoDevice if there are fewer. With "cpu", or where nothing else can be, this process uses no other platform from
    then on."""
    nobody_chose = wanted is None and not jax.config.jax_platforms
    if wanted == "cpu" or (nobody_chose and not may_have_tpu() and not metadata.entry_points(group="jax_plugins")):
        # Else libtpu takes the chips, which another program may need, or prints errors because there are none.
        jax.config.update("jax_platforms", "cpu")
    for name in [wanted] if wanted else ["tpu", "gpu", "cpu"]:
        try:
            devices = jax.devices(name)
        except RuntimeError:
            continue
        if (processes := len({device.process_index for device in devices})) > 1:
            return PLATFORMS[name], _of_each_process(name, devices, number, processes)
        if len(devices) < number:
            more = "; XLA_FLAGS=--xla_force_host_platform_device_count=N divides a CPU into N" if name == "cpu" else ""
            raise NoDevice(
                f"the launch needs {number} devices (--tp-size times --dp-size); this machine has {len(devices)} {name} device(s){more}"
            )
        return PLATFORMS[name], devices[:number]
    present = sorted({d.platform for d in jax.devices()})
    raise NoDevice(
        f"--device {wanted}: jax sees no {wanted} on this machine, only {', '.join(present)}; "
        "`python -m sgl_jax.check_env` says why"
    )


def may_have_tpu(root: Path = ROOT) -> bool:
    """Return whether a device file, or a Google device on the PCI bus that is no disk and no network, may be a TPU."""
    google = (each.parent for each in root.glob("sys/bus/pci/devices/*/vendor") if read(each) == "0x1ae0")
    nodes = (*root.glob("dev/accel[0-9]*"), *root.glob("dev/vfio/[0-9]*"))
    return bool(nodes) or any(not read(each / "class").startswith(("0x01", "0x02")) for each in google)


def _of_each_process(name: Name, devices: list[jax.Device], number: int, processes: int) -> list[jax.Device]:
    """Return `number` devices, equally many of each process."""
    per_process = number // processes
    found = []
    for process in range(processes):
        own = [device for device in devices if device.process_index == process]
        if len(own) < per_process:
            raise NoDevice(
                f"the launch needs {number} devices (--tp-size times --dp-size), {per_process} of each machine; machine {process} "
                f"has {len(own)} {name} device(s)"
            )
        found += own[:per_process]
    return found


def kernels_for(attention_backend: str | None, platform: Platform, model: DecoderConfig) -> Kernels:
    """Return the kernels of a launch. No attention backend means the platform's default. Raises NoSuchBackend."""
    name = attention_backend or platform.attention
    library = find_library() if platform.name == "cpu" else None
    if attention_backend is None and name == "cpu" and library is None:
        said = (
            "Attention runs in plain XLA, which is several times slower: the library for CPUs is not there, since sgl_jax was "
            "installed without a C++ compiler; install one (g++), and sgl_jax again."
        )
        # Kernels are asked for twice where a model is fetched.
        log.once(logger, "--attention-backend", said, logging.WARNING)
        name = "native"
    latent = model.mla is not None
    attention = find_backend(name, platform.name, vectorise=platform.vectorises_rows, latent=latent)
    grouped = grouped_matmul_for(platform.name)
    if platform.name == "tpu":
        from sgl_jax.ops.quantized_matmul import pallas_tpu as quantized  # importing Pallas is slow

        # XLA adds residuals in its own products, which is faster where most of the time goes to experts.
        dense = dense_for(platform.name) if model.moe is None else None
        product, gated_product, norms = dense or (plain_product, no_gated_product, PLAIN_NORMS)
        quantised = quantized.quantized_matmul, quantized.quantized_grouped_matmul
        routed = routed_experts_for(platform.name)
        return Kernels(attention, grouped, product, *quantised, routed, gated=gated_product, norms=norms)
    if library is None:
        return Kernels(attention, grouped)
    quantised = library_matmul(library), library_grouped_matmul(library)
    more = {"adapters": library_addend(library), "library": library}
    return Kernels(attention, grouped, library_product(library), *quantised, **more)


def dense_for(platform: Name) -> tuple[DenseProduct, GatedProduct, Norms] | None:
    """Return the kernels of dense layers."""
    if platform != "tpu":
        return None
    from sgl_jax.ops import norm_tpu  # importing Pallas is slow
    from sgl_jax.ops.dense import pallas_tpu

    return pallas_tpu.product, pallas_tpu.gated_product, norm_tpu.NORMS


def routed_experts_for(platform: Name) -> RoutedExperts | None:
    if platform != "tpu":
        return None
    from sgl_jax.ops.experts import pallas_tpu  # importing Pallas is slow

    return pallas_tpu.routed_experts


def grouped_matmul_for(platform: Name) -> GroupedMatmul:
    if platform == "tpu":
        from sgl_jax.ops.grouped_matmul import pallas_tpu  # importing Pallas is slow

        return pallas_tpu.grouped_matmul
    return grouped_native.grouped_matmul if platform == "cpu" else grouped_native.ragged_dot
