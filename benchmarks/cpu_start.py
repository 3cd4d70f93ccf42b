"""Measure starts of the server on a CPU, from the command to the first chat answer: cold, with an empty compilation cache, and warm.

    python benchmarks/cpu_start.py --out benchmarks/cpu/start.json

Wall seconds, processor seconds of all the server's processes, and the peak of their memory (the sum of their proportional
set sizes), beside what weights and KV take. Medians of several starts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from provenance import commit, machine

CLOCK, PAGE = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
READY_S, EVERY_S = 300, 0.05
QUESTION = {
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "max_tokens": 8,
    "temperature": 0,
}


class Processes:
    """Process group of a server."""

    def __init__(self, group: int):
        self._group = group
        self._highest = 0
        self.peak_bytes = 0  # proportional set size

    def _stats(self) -> Iterator[tuple[Path, list[str]]]:
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # it has ended
                fields = path.read_text().rpartition(")")[2].split()
                if int(fields[2]) == self._group:
                    yield path.parent, fields

    def cpu_seconds(self) -> float:
        return sum(int(ticks) for _, fields in self._stats() for ticks in fields[11:15]) / CLOCK

    def look(self) -> None:
        """Take in the memory. Proportional sizes cost more to read, so they are read when resident ones are higher than ever."""
        found = [*self._stats()]
        resident = sum(int(fields[21]) for _, fields in found) * PAGE
        if resident <= 1.005 * self._highest:
            return
        self._highest, proportional = resident, 0
        for folder, _ in found:
            with contextlib.suppress(OSError):
                lines = (folder / "smaps_rollup").read_text().splitlines()
                proportional += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024
        self.peak_bytes = max(self.peak_bytes, proportional)


def answer(url: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """Return the server's answer; None while it gives none."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)
    except OSError:
        return None


def start(model: Path, cache: Path, port: int, flags: Sequence[str]) -> dict[str, Any]:
    """Start the server and stop it behind its first answer."""
    command = [sys.executable, "-m", "sgl_jax.launch_server", "--model-path", str(model), "--port", str(port), *flags]
    began = time.monotonic()
    with (cache.parent / f"{cache.name}.log").open("ab") as log:
        command += ["--compilation-cache-dir", str(cache)]
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    processes, url = Processes(server.pid), f"http://127.0.0.1:{port}"
    try:
        while answer(url, "/ready") is None:
            if server.poll() is not None or time.monotonic() - began > READY_S:
                raise RuntimeError(f"the server has ended, or gives no answer after {READY_S} s: {' '.join(command)}")
            processes.look()
            time.sleep(EVERY_S)
        said = answer(url, "/v1/chat/completions", QUESTION)
        found = {"wall_s": time.monotonic() - began, "cpu_s": processes.cpu_seconds()}
        processes.look()
        info = answer(url, "/get_server_info")
        assert said is not None
        assert info is not None
        info = info["engine"]
        held = info["weight_bytes"] + info["kv_bytes_per_token"] * info["max_total_tokens"]
        text = said["choices"][0]["message"]["content"]
        peak = processes.peak_bytes
        return found | {"peak_mb": peak / 1e6, "weights_and_kv_mb": held / 1e6, "answer": text}
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description="Cold and warm starts of the server on a CPU.")
    parser.add_argument("--model", type=Path, default=Path(".models/SmolLM2-135M-Instruct.Q4_1.gguf"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--port", type=int, default=30100)
    parser.add_argument("--out", type=Path, help="file for the results, as JSON")
    parser.add_argument("flags", nargs="*", help="further flags of the server, behind --")
    args = parser.parse_args()
    starts: dict[str, list[dict[str, Any]]] = {"cold": [], "warm": []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            for kind in starts:
                found = start(args.model, Path(folder, f"cache{number}"), args.port, ["--device", "cpu", *args.flags])
                starts[kind].append({k: round(v, 2) if isinstance(v, float) else v for k, v in found.items()})
                print(kind, json.dumps(starts[kind][-1]), flush=True)
    medians = {
        kind: {key: statistics.median(each[key] for each in found) for key in ("wall_s", "cpu_s", "peak_mb")}
        for kind, found in starts.items()
    }
    print(json.dumps(medians, indent=2))
    if args.out is not None:
        given = {"model": args.model.name, "flags": args.flags, "commit": commit(), "machine": machine()}
        args.out.write_text(json.dumps(given | {"medians": medians, "starts": starts}, indent=2) + "\n")


if __name__ == "__main__":
    main()
