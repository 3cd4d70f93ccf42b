"""Memory of a device, and its division into weights and KV pages."""

import dataclasses
import os
import re
from pathlib import Path

import jax

from sgl_jax.runtime import control_groups
from sgl_jax.runtime.control_groups import ROOT
from sgl_jax.runtime.platform import Platform


class DoesNotFit(ValueError):
    """The model or its KV does not fit the device; the message says by how much, and what to change."""


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Division of a device's memory."""

    total_bytes: int  # memory of the device; on CPU what was free
    budget_bytes: int  # limit of weights, row state and KV together
    weight_bytes: int
    bytes_per_token: int  # KV of a token
    page_size: int
    num_pages: int  # scratch page included

    @property
    def kv_bytes(self) -> int:
        return self.num_pages * self.page_size * self.bytes_per_token

    @property
    def num_tokens(self) -> int:
        """Tokens of KV that requests can use."""
        return (self.num_pages - 1) * self.page_size


def device_memory(device: jax.Device, root: Path = ROOT) -> int:
    """Return the bytes that a launch may divide: all of an accelerator's memory, as its runtime reports it; on CPU, whose
    memory other programs use as well, `free_memory`. Raises DoesNotFit if a runtime does not say."""
    is_cpu = device.platform == "cpu"
    found = free_memory(device, root) if is_cpu else (device.memory_stats() or {}).get("bytes_limit")
    if found is None:
        raise DoesNotFit(f"{device.device_kind} does not report its memory; set --max-total-tokens")
    return found


def free_memory(device: jax.Device, root: Path = ROOT) -> int | None:
    """Return the bytes that can be allocated now; None if an accelerator does not say. `root` is taken as /."""
    if device.platform == "cpu":
        free, limited = _available_memory(root), control_groups.free_memory(root)
        return free if limited is None else min(free, limited)
    stats = device.memory_stats() or {}
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0) if "bytes_limit" in stats else None


def _available_memory(root: Path) -> int:
    """Return the bytes the machine can give without swapping; unused ones only where the kernel does not say."""
    if found := re.search(r"^MemAvailable:\s+(\d+) kB$", control_groups.read(root / "proc/meminfo"), re.MULTILINE):
        return int(found[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def plan_memory(
    platform: Platform,
    *,
    total_bytes: int,
    weight_bytes: int,
    state_bytes: int,
    bytes_per_token: int,
    page_size: int,
    context_length: int,
    num_rows: int,
    mem_fraction: float | None,
    max_total_tokens: int | None,
    num_ranks: int = 1,
) -> MemoryPlan:
    """Divide the device's memory. `state_bytes`: row state besides KV; `num_rows`: requests running at once on a rank;
    `max_total_tokens`: for all data ranks together. Raises DoesNotFit if not even one request of two pages fits.

    Where other programs use the memory as well (max_pool_tokens), the pool takes no more than its requests can use: full
    contexts for every row, and as many tokens of cached prefixes.
    """
    least = 2 * page_size * num_ranks
    of_each = f" on each of {num_ranks} data ranks" if num_ranks > 1 else ""
    if max_total_tokens is not None and max_total_tokens < least:
        raise DoesNotFit(
            f"--max-total-tokens {max_total_tokens} is less than two pages of {page_size} tokens{of_each}; "
            f"set it to at least {least} or lower --page-size"
        )
    memory = f"{total_bytes / 1e9:.2f} GB{' that are free' if platform.name == 'cpu' else ''}"
    fraction = mem_fraction if mem_fraction is not None else platform.mem_fraction
    budget = int(total_bytes * fraction)
    fitting = (budget - weight_bytes - state_bytes) // bytes_per_token
    if max_total_tokens is not None:
        tokens = -(-max_total_tokens // num_ranks)
        if fitting < tokens:
            raise DoesNotFit(
                f"--max-total-tokens {max_total_tokens} takes {tokens * bytes_per_token / 1e9:.2f} GB of KV{of_each} beside "
                f"{(weight_bytes + state_bytes) / 1e9:.2f} GB of weights and row state, and --mem-fraction-static "
                f"{fraction} of {memory} is {budget / 1e9:.2f} GB: it holds "
                f"{max(0, fitting) * num_ranks} tokens"
            )
    else:
        tokens = fitting
        if platform.max_pool_tokens is not None:
            contexts = 1 if mem_fraction is None else 2 * num_rows
            tokens = min(_rounded(fitting), max(platform.max_pool_tokens, contexts * context_length))
    num_pages = tokens // page_size
    if num_pages < 2:
        held = weight_bytes + state_bytes
        advice = (
            "raise --mem-fraction-static, lower --page-size or use a smaller model"
            if held < 0.95 * total_bytes
            else "divide it over more devices with --tp-size, or use a smaller model"
        )
        raise DoesNotFit(
            f"no room for KV: weights and row state take {held / 1e9:.2f} GB of the {budget / 1e9:.2f} GB that "
            f"--mem-fraction-static {fraction} of {memory} allows, and a page of {page_size} tokens "
            f"takes {page_size * bytes_per_token / 1e6:.2f} MB; {advice}"
        )
    return MemoryPlan(total_bytes, budget, weight_bytes, bytes_per_token, page_size, num_pages + 1)


def _rounded(tokens: int) -> int:
    """Round down to four significant bits. Free memory differs a little from start to start, and the pool's size is a
    part of the compiled programs, which are to be found in the cache again."""
    low = max(tokens.bit_length() - 4, 0)
    return tokens >> low << low
