"""Measured rates of the devices: bytes read from memory per second, operations of a matrix product per second.

Both are a product with one matrix, repeated inside one program, each product the factor of the next: nothing can be
left out, and dispatch is paid once. Matrix times vector reads the matrix once and does little else, as a decode step
does; XLA CPU runs it on every core within 3 % of what threads of numpy sums read, where its own reductions reach half
once they do more than a plain float32 sum (benchmarks/LOG.md). Matrix times matrix is as prefill multiplies.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from sgl_jax.planning.cost import Rates
from sgl_jax.runtime.compiler import matmul_precision
from sgl_jax.runtime.memory import free_memory

_RUNS = 8  # the best counts: whatever else runs on the machine only takes away
_SHARE_OF_FREE_MEMORY = 4  # one in


class NotMeasured(ValueError):
    """The limits cannot be measured; the message says why."""


@dataclasses.dataclass(frozen=True)
class Probe:
    """How large the matrices are, and how often they are multiplied in one program."""

    read_bytes: int  # far beyond the caches
    read_repeats: int
    matmul_size: int  # rows and columns
    matmul_repeats: int


# A program should take some tens of milliseconds, and reading must miss the caches: a CPU's hold hundreds of MiB.
_CPU = Probe(read_bytes=1 << 30, read_repeats=1, matmul_size=2048, matmul_repeats=1)
_ACCELERATOR = Probe(read_bytes=1 << 28, read_repeats=200, matmul_size=8192, matmul_repeats=16)


def measure_rates(devices: Sequence[jax.Device], dtype: str, probe: Probe | None = None) -> Rates:
    """Return the rates of each device while all work at the same time; matmul in `dtype`, as precisely as models run.

    Takes a quarter of the free memory at most, about 2 s on two CPU cores. Raises NotMeasured where there is too little.
    """
    if any(device.process_index != jax.process_index() for device in devices):
        raise NotMeasured("the limits cannot be measured over several machines; measure those of each with --nnodes 1")
    on_cpu = devices[0].platform == "cpu"
    probe = probe or (_CPU if on_cpu else _ACCELERATOR)
    distinct = devices[:1] if on_cpu else devices  # virtual CPU devices are the same cores, and one uses them all
    try:
        read, flops = _read_rate(distinct, probe), _matmul_rate(distinct, dtype, probe)
        return Rates(flops / len(devices), read / len(devices), math.inf)
    except jax.errors.JaxRuntimeError as error:
        raise NotMeasured(f"the limits cannot be measured: {str(error).splitlines()[0]}") from error


def repeated_product(matrix: Float[Array, "n n"], x: Float[Array, "n ..."], repeats: int) -> Float[Array, "n ..."]:
    """matrix^repeats @ x, multiplied from the right, one product after the other."""
    return lax.fori_loop(0, repeats, lambda _, x: matrix @ x, x)


def _read_rate(devices: Sequence[jax.Device], probe: Probe) -> float:
    size = math.isqrt(_allowed(devices, probe.read_bytes, "reading") // 4) // 128 * 128

    def operands() -> tuple[jax.Array, jax.Array]:
        return jnp.full((size, size), 1 / size, jnp.float32), jnp.ones(size, jnp.float32)

    seconds = _best_seconds(devices, operands, probe.read_repeats)
    return len(devices) * probe.read_repeats * 4 * size**2 / seconds


def _matmul_rate(devices: Sequence[jax.Device], dtype: str, probe: Probe) -> float:
    size = probe.matmul_size
    _allowed(devices, 3 * size**2 * jnp.dtype(dtype).itemsize, "multiplying", least=1.0)

    def operands() -> tuple[jax.Array, jax.Array]:
        # Random: chips multiply constants with less power, and so faster. Scaled so that repeats neither grow nor fade.
        matrix = jax.random.normal(jax.random.key(0), (size, size), dtype) / math.sqrt(size)
        return matrix.astype(dtype), matrix.astype(dtype)

    with jax.default_matmul_precision(matmul_precision(dtype)):
        seconds = _best_seconds(devices, operands, probe.matmul_repeats)
    return len(devices) * probe.matmul_repeats * 2 * size**3 / seconds


def _best_seconds(
    devices: Sequence[jax.Device], operands: Callable[[], tuple[jax.Array, jax.Array]], repeats: int
) -> float:
    """The fastest run of the repeated product on every device at once."""
    make = jax.jit(operands)
    product = jax.jit(repeated_product, static_argnums=2)
    held = []
    for device in devices:
        with jax.default_device(device):
            held.append(make())

    def run() -> float:
        start = time.perf_counter()
        jax.block_until_ready([product(matrix, x, repeats) for matrix, x in held])
        return time.perf_counter() - start

    run()  # compiles
    return min(run() for _ in range(_RUNS))


def _allowed(devices: Sequence[jax.Device], wanted: int, what: str, least: float = 0.5) -> int:
    """The bytes to use of those wanted, on each device: half of them still measure memory and not a cache."""
    free = [found for device in devices if (found := free_memory(device)) is not None]
    allowed = min([wanted, *(each // _SHARE_OF_FREE_MEMORY for each in free)])
    if allowed < least * wanted:
        raise NotMeasured(
            f"the limits cannot be measured: {what} takes {least * wanted / 2**20:.0f} MiB, a quarter of the free memory "
            f"at most, and {min(free) / 2**20:.0f} MiB are free; lower --mem-fraction-static or --max-total-tokens"
        )
    return allowed
