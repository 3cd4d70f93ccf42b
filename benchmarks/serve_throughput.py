"""Served throughput of one model over HTTP, at several concurrencies, beside the machine's own memory bandwidth.

    python benchmarks/serve_throughput.py --model .models/SmolLM2-135M-Instruct.Q4_1.gguf --dtype bfloat16 \
        --output benchmarks/serve_smollm2_bfloat16.json

Starts a server, sends random token-id prompts (no two alike, so nothing is cached), streams the answers, stops it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

HOST, PORT = "127.0.0.1", 31789


async def request(prompt: list[int], max_tokens: int) -> tuple[float, list[float]]:
    """Start time, and the arrival time of each streamed token."""
    body = json.dumps(
        {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    ).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
    start = time.perf_counter()
    reader, writer = await asyncio.open_connection(HOST, PORT, limit=1 << 20)
    writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
    arrivals = []
    status = await reader.readline()
    if b" 200 " not in status:
        raise RuntimeError(f"the server answered {status!r}: {await reader.read()!r}")
    while line := await reader.readline():
        if line.startswith(b"data: {"):
            arrivals.append(time.perf_counter())
    writer.close()
    return start, arrivals


async def run(concurrency: int, num_requests: int, input_len: int, output_len: int) -> dict:
    rng = random.Random(concurrency)
    prompts = [[rng.randrange(1000, 40000) for _ in range(input_len)] for _ in range(num_requests)]
    slots = asyncio.Semaphore(concurrency)

    async def one(prompt: list[int]) -> tuple[float, list[float]]:
        async with slots:
            return await request(prompt, output_len)

    start = time.perf_counter()
    results = await asyncio.gather(*map(one, prompts))
    seconds = time.perf_counter() - start
    ttft = [arrivals[0] - began for began, arrivals in results]
    tpot = [(arrivals[-1] - arrivals[0]) / (output_len - 1) for _, arrivals in results]
    return {
        "concurrency": concurrency,
        "requests": num_requests,
        "seconds": round(seconds, 2),
        "output_tokens_per_s": round(num_requests * output_len / seconds, 1),
        "ttft_ms_median": round(statistics.median(ttft) * 1e3, 1),
        "tpot_ms_median": round(statistics.median(tpot) * 1e3, 1),
    }


def memory_bandwidth() -> float:
    """GB/s at which every core together reads memory: the best of five sums over 1 GiB."""
    from concurrent.futures import ThreadPoolExecutor

    data = np.ones(1 << 27, np.float64)
    parts = np.array_split(data, os.cpu_count() or 1)
    with ThreadPoolExecutor(len(parts)) as pool:

        def once() -> float:
            start = time.perf_counter()
            list(pool.map(np.sum, parts))
            return data.nbytes / (time.perf_counter() - start) / 1e9

        return max(once() for _ in range(5))


def get(path: str) -> dict:
    import urllib.request

    with urllib.request.urlopen(f"http://{HOST}:{PORT}{path}", timeout=5) as answer:
        return json.loads(answer.read())


def start_server(model: str, dtype: str, extra: list[str]) -> tuple[subprocess.Popen, float]:
    command = [sys.executable, "-m", "sgl_jax.launch_server", "--model-path", model, "--dtype", dtype]
    start = time.perf_counter()
    server = subprocess.Popen([*command, "--port", str(PORT), "--log-level", "warning", *extra])
    while time.perf_counter() - start < 600:
        if server.poll() is not None:
            raise SystemExit(f"the server ended with code {server.returncode}")
        try:
            get("/ready")
            return server, time.perf_counter() - start
        except OSError:
            time.sleep(0.1)
    server.kill()
    raise SystemExit("the server was not ready after 600 s")


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="requests per slot of concurrency")
    parser.add_argument("--output", type=Path)
    args, extra = parser.parse_known_args()

    bandwidth = memory_bandwidth()
    server, start_seconds = start_server(args.model, args.dtype, extra)
    try:
        asyncio.run(run(2, 2, args.input_len, 8))
        results = [
            asyncio.run(run(c, max(c * args.rounds, 4), args.input_len, args.output_len)) for c in args.concurrency
        ]
        info = get("/get_server_info")
    finally:
        server.terminate()
        server.wait(60)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    weight_gb = info["engine"]["weight_bytes"] / 1e9
    report = {
        "command": "python benchmarks/serve_throughput.py " + " ".join(sys.argv[1:]),
        "commit": commit.stdout.strip(),
        "machine": {"cpu": cpu_model(), "cores": os.cpu_count(), "memory_read_gb_per_s": round(bandwidth, 1)},
        "model": Path(args.model).name,
        "dtype": args.dtype,
        "input_len": args.input_len,
        "output_len": args.output_len,
        "start_seconds": round(start_seconds, 1),
        "results": results,
    }
    if results[0]["concurrency"] == 1:
        step_bytes = weight_gb + info["engine"]["kv_bytes_per_token"] * (args.input_len + args.output_len / 2) / 1e9
        reached = step_bytes / (results[0]["tpot_ms_median"] / 1e3)
        report["decode_at_concurrency_1"] = {
            "gb_per_token": round(step_bytes, 3),
            "gb_per_s": round(reached, 1),
            "share_of_memory_bandwidth": round(reached / bandwidth, 2),
        }
    text = json.dumps(report, indent=1)
    print(text)
    if args.output:
        args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
