"""Measure a model in bfloat16 and as int8 on a CPU, and llama.cpp's server beside them: the same client and prompts, in turn.

    python benchmarks/cpu_quantised.py --model .models/SmolLM2-135M-Instruct.Q4_1.gguf --out benchmarks/cpu/quantised.json \\
        --llama PATH/bin/python --gguf Q8_0=PATH --gguf Q4_0=PATH

The model is written once as a Hugging Face folder, as in cpu_servers.py. While one server is measured, the others are stopped with
SIGSTOP. Each round sends prompts that no server has seen. --llama names the Python of an environment with xllamacpp, see
llama_cpp_server.py; without --gguf only this project's servers are measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cpu_servers import FIGURES, PAUSE_S, Case, Server, measure, start, wait_compiled, wait_ready, write_folder
from provenance import commit, machine

CASES = [Case(128, 64, 1, 3), Case(128, 64, 8, 16), Case(128, 64, 32, 32)]
OURS = {"bfloat16": [], "int8": ["--quantization", "int8"], "int8-weight-only": ["--quantization", "int8-weight-only"]}


def commands(args: argparse.Namespace, folder: Path) -> Iterator[tuple[str, int, list[str]]]:
    """Yield the name, port and command of each server."""
    ours = [sys.executable, "-m", "sgl_jax.launch_server", "--model-path", str(folder), "--dtype", "bfloat16"]
    ours += ["--served-model-name", "m", "--host", "127.0.0.1", "--context-length", "2048", "--port"]
    for port, name in enumerate(args.ours, 8321):
        yield name, port, [*ours, str(port), *OURS[name]]
    script = str(Path(__file__).with_name("llama_cpp_server.py"))
    for port, (name, path) in enumerate((each.split("=", 1) for each in args.gguf), 8331):
        yield f"llama.cpp {name}", port, [args.llama, script, path, str(port)]


def rounds(servers: list[Server], folder: Path, case: Case, seed: int, number: int) -> dict[str, Any]:
    """Return the medians of each server's figures, and all of them."""
    found: dict[str, list[dict[str, float]]] = {server.name: [] for server in servers}
    for turn in range(number):
        for server in servers:
            server.signal(signal.SIGCONT)
            time.sleep(PAUSE_S)
            found[server.name].append(measure(server, folder, case, seed + turn))
            server.signal(signal.SIGSTOP)
            print(case, server.name, found[server.name][-1], flush=True)
    figures = (*FIGURES, "cpu_seconds")
    medians = {
        name: {k: round(statistics.median(run[k] for run in r), 2) for k in figures} for name, r in found.items()
    }
    return {"case": str(case), "medians": medians, "rounds": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="GGUF")
    parser.add_argument("--ours", nargs="+", default=[*OURS], choices=[*OURS])
    parser.add_argument("--llama", metavar="PYTHON", help="with xllamacpp")
    parser.add_argument("--gguf", action="append", default=[], metavar="NAME=PATH", help="a model for llama.cpp")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "cpu_servers", help="model and logs")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    folder = args.work / "model"
    if not (folder / "model.safetensors").exists():
        write_folder(args.model, folder)
    servers: list[Server] = []
    try:
        for name, port, command in commands(args, folder):
            servers.append(start(name, command, port, args.work / f"{name.replace(' ', '_')}.log"))
            wait_ready(servers[-1])
            measure(servers[-1], folder, dataclasses.replace(CASES[0], num_prompts=2), 999)  # the first ones are slower
            if name in OURS:
                wait_compiled(servers[-1])
            servers[-1].signal(signal.SIGSTOP)
        results = [rounds(servers, folder, case, 100 * i, args.rounds) for i, case in enumerate(CASES)]
    finally:
        for server in servers:
            server.signal(signal.SIGCONT)
            server.signal(signal.SIGTERM)
    about = {"commit": commit(), "machine": machine(), "dtype": "bfloat16"}
    args.out.write_text(json.dumps(about | {"results": results}, indent=1) + "\n")
    for result in results:
        print(result["case"], {name: each["output_throughput"] for name, each in result["medians"].items()})


if __name__ == "__main__":
    main()
