"""A server of several processes on this machine, each with virtual CPU devices of its own."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np

import sgl_jax
from quick_compiles import XLA_FLAG
from sgl_jax.observability.log import READY

PATIENCE_S = 240.0  # for steps that take seconds on an idle machine
TOKEN = "a-secret-of-the-hosts"
SIZES = {"dtype": "float32", "max_running_requests": 8, "chunked_prefill_size": 8, "context_length": 96}


def free_ports() -> int:
    """Find a port that is free, and the one above it, too."""
    for _ in range(50):
        with socket.create_server(("127.0.0.1", 0)) as a:
            port = a.getsockname()[1]
            with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port + 1)):
                return port
    raise AssertionError("no two ports in a row are free")


class Host:
    """Process of one host, whose log is a file."""

    def __init__(self, log: Path, flags: Sequence[str], devices: int, token: str = TOKEN):
        self.log = log
        environment = os.environ | {
            "XLA_FLAGS": f"{XLA_FLAG} --xla_force_host_platform_device_count={devices}",
            "SGL_JAX_DIST_TOKEN": token,
        }
        command = [sys.executable, "-m", "sgl_jax.launch_server", *flags]
        with open(log, "wb") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, words: str) -> str:
        """Wait until the words are in the log, and return it."""
        deadline = time.monotonic() + PATIENCE_S
        while words not in (text := self.text()):
            assert self.process.poll() is None, text[-4000:]
            assert time.monotonic() < deadline, text[-4000:]
            time.sleep(0.1)
        return text

    def wait(self) -> int:
        return self.process.wait(PATIENCE_S)


class Hosts:
    """Hosts with common flags; `lead` starts host 0, `join` another one."""

    def __init__(self, folder: Path, model: Path, nnodes: int, devices: int, *flags: str):
        self._folder, self._devices = folder, devices
        self.address = f"127.0.0.1:{free_ports()}"
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.flags = ["--model-path", str(model), "--device", "cpu", "--dtype", "float32"]
        self.flags += ["--nnodes", str(nnodes), "--dist-init-addr", self.address, *flags]
        self.flags += ["--compilation-cache-dir", str(folder / "compiled")]
        self.all: list[Host] = []

    def lead(self, *flags: str) -> Host:
        self.leader = self.join(0, "--port", str(self.port), *flags)
        return self.leader

    def join(self, rank: int, *flags: str, token: str = TOKEN) -> Host:
        log = self._folder / f"{len(self.all)}.log"
        self.all.append(Host(log, [*self.flags, "--node-rank", str(rank), *flags], self._devices, token))
        return self.all[-1]

    def wait_ready(self) -> None:
        self.leader.wait_for(READY)

    def ask(self, ids: Any, lora_path: Any = None, **params: Any) -> Any:
        sampling = {"temperature": 0, "ignore_eos": True} | params
        body = {"input_ids": ids, "sampling_params": sampling, "lora_path": lora_path}
        return httpx.post(f"{self.url}/generate", json=body, timeout=PATIENCE_S)

    def metric(self, name: str) -> float:
        text = httpx.get(f"{self.url}/metrics", timeout=PATIENCE_S).text
        found = re.search(rf"^sgl_jax_{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE)
        assert found is not None, text
        return float(found[1])


@contextlib.contextmanager
def hosts(folder: Path, model: Path, nnodes: int, devices: int, *flags: str) -> Iterator[Hosts]:
    running = Hosts(folder, model, nnodes, devices, *flags)
    try:
        yield running
    finally:
        for host in running.all:
            host.process.kill()
            host.process.wait()


def flags_of(**sizes: Any) -> list[str]:
    return [word for name, value in sizes.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def prompts() -> list[list[int]]:
    """Make prompts of many lengths, two of three of which begin alike."""
    rng = np.random.default_rng(0)
    common = rng.integers(3, 500, 24).tolist()
    return [
        (common if i % 3 else []) + rng.integers(3, 500, n).tolist()
        for i, n in enumerate((3, 1, 9, 20, 2, 6, 30, 5, 1, 12))
    ]


def on_one_device(model: Path, max_new_tokens: int) -> list[list[int]]:
    """Return the greedy answers of an engine on one device, with room for all and no prefix cache."""
    sizes = SIZES | {"max_total_tokens": 4096, "disable_radix_cache": True, "device": "cpu"}
    with sgl_jax.Engine(model_path=str(model), **sizes) as engine:
        params = {"temperature": 0, "ignore_eos": True, "max_new_tokens": max_new_tokens}
        return [answer["output_ids"] for answer in engine.generate(input_ids=prompts(), sampling_params=params)]
