"""Measure what LoRA adapters cost on a CPU: a launch with 8 beside one without, and 200 that take turns in 8 slots.

    python benchmarks/cpu_lora.py --model .models/SmolLM2-135M-Instruct.Q4_1.gguf --out benchmarks/cpu/lora.json

Servers are measured in turn with the same client and prompts, in rounds, while the others are stopped with SIGSTOP. The adapters
have random numbers and change all linear modules. `turns`: requests for the model itself, whose times between tokens are
reported, run beside requests for 8 adapters that are in the slots, and beside requests for 200 that are not.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
from cpu_servers import PAUSE_S, Case, Server, start, wait_compiled, wait_ready, write_folder
from provenance import commit, machine
from safetensors.numpy import save_file

RANK, SLOTS, MANY = 16, 8, 200
CASES = [Case(128, 64, 1, 3), Case(128, 64, 32, 64)]
FIGURES = ("output_throughput", "median_ttft_ms", "median_tpot_ms", "p99_itl_ms")
BESIDE = Case(64, 200, 4, 12)  # requests for the model itself
OTHERS = Case(32, 16, 8, 200)  # requests for adapters


def write_adapter(model: Path, folder: Path, seed: int) -> None:
    """Write an adapter for every linear module of a Llama model's layers."""
    config = json.loads((model / "config.json").read_text())
    d, f, h = (config[name] for name in ("hidden_size", "intermediate_size", "head_dim"))
    q, kv = (config[name] * h for name in ("num_attention_heads", "num_key_value_heads"))
    shapes = {"self_attn.q_proj": (q, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d)}
    shapes |= {"self_attn.o_proj": (d, q), "mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f)}
    rng, tensors = np.random.default_rng(seed), {}
    for layer in range(config["num_hidden_layers"]):
        for name, (rows, columns) in shapes.items():
            module = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{module}.lora_A.weight"] = 0.02 * rng.standard_normal((RANK, columns), np.float32)
            tensors[f"{module}.lora_B.weight"] = 0.02 * rng.standard_normal((rows, RANK), np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    modules = [name.rpartition(".")[2] for name in shapes]
    about = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": modules}
    (folder / "adapter_config.json").write_text(json.dumps(about))


def client(server: Server, model: Path, case: Case, seed: int, out: Path, names: list[str]) -> subprocess.Popen[bytes]:
    words = f"--backend sglang-oai --base-url http://127.0.0.1:{server.port} --dataset-name random-ids --random-range-ratio 1"
    words += f" --random-input-len {case.input_len} --random-output-len {case.output_len} --seed {seed}"
    words += (
        f" --warmup-requests 0 --num-prompts {case.num_prompts} --max-concurrency {case.concurrency} --disable-tqdm"
    )
    command = [sys.executable, "-m", "sgl_jax.bench_serving", *words.split(), "--tokenizer", str(model)]
    command += ["--output-file", str(out), *(["--lora-name", *names] if names else [])]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def measure(server: Server, model: Path, case: Case, seed: int, names: list[str]) -> dict[str, float]:
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as out:
        before = server.cpu_seconds()
        if client(server, model, case, seed, Path(out.name), names).wait():
            raise RuntimeError(f"{server.name}: requests failed")
        figures = json.loads(Path(out.name).read_text())
        return {name: figures[name] for name in FIGURES} | {"cpu_seconds": server.cpu_seconds() - before}


def beside(server: Server, model: Path, seed: int, names: list[str]) -> dict[str, float]:
    """Measure requests for the model itself while others ask for adapters without a pause."""
    with tempfile.TemporaryDirectory() as folder:
        others = client(server, model, OTHERS, seed, Path(folder, "others.jsonl"), names)
        try:
            time.sleep(2)
            return measure(server, model, BESIDE, seed + 1, [])
        finally:
            others.terminate()
            others.wait()


def loads(server: Server) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/get_server_info", timeout=30) as answer:
        numbers = json.load(answer)["internal_states"][0]
    assert numbers["compiles_after_ready"] == 0
    return numbers["adapter_loads"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="GGUF")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "cpu_servers", help="model and logs")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    model, adapters = args.work / "model", args.work / "adapters"
    if not (model / "model.safetensors").exists():
        write_folder(args.model, model)
    for i in range(MANY):
        if not (adapters / f"a{i}").exists():
            write_adapter(model, adapters / f"a{i}", i)
    ours = [sys.executable, "-m", "sgl_jax.launch_server", "--model-path", str(model), "--dtype", "bfloat16"]
    ours += ["--served-model-name", "m", "--host", "127.0.0.1", "--context-length", "2048", "--port"]
    names = [f"a{i}" for i in range(SLOTS)]
    flags = ["--max-loras-per-batch", str(SLOTS), "--max-lora-rank", str(RANK), "--lora-dir", str(adapters)]
    servers, asked = [], {"base": [], "8 adapters": names, "8 adapters, none asked for": []}
    try:
        for port, (name, more) in enumerate((("base", []), ("8 adapters", flags)), 8321):
            servers.append(start(name, [*ours, str(port), *more], port, args.work / f"{name.replace(' ', '_')}.log"))
            wait_ready(servers[-1])
            measure(servers[-1], model, CASES[-1], 999, names if more else [])  # the first ones are slower
            wait_compiled(servers[-1])
            servers[-1].signal(signal.SIGSTOP)
        results = []
        for i, case in enumerate(CASES):
            found: dict[str, list[dict[str, float]]] = {name: [] for name in asked}
            for turn in range(args.rounds):
                for name, wanted in asked.items():
                    server = servers[0 if name == "base" else 1]
                    server.signal(signal.SIGCONT)
                    time.sleep(PAUSE_S)
                    found[name].append(measure(server, model, case, 100 * i + turn, wanted))
                    server.signal(signal.SIGSTOP)
                    print(case, name, found[name][-1], flush=True)
            results.append({"case": str(case), "medians": medians(found), "rounds": found})
        results.append(turns(servers[1], model, args.rounds, names))
    finally:
        for server in servers:
            server.signal(signal.SIGCONT)
            server.signal(signal.SIGTERM)
    about = {"commit": commit(), "machine": machine(), "dtype": "bfloat16", "rank": RANK, "slots": SLOTS}
    args.out.write_text(json.dumps(about | {"results": results}, indent=1) + "\n")
    for result in results:
        print(result["case"], result["medians"])


def turns(server: Server, model: Path, rounds: int, names: list[str]) -> dict[str, Any]:
    """Compare requests beside adapters that are in their slots with requests beside adapters that are not."""
    server.signal(signal.SIGCONT)
    everyone = [f"a{i}" for i in range(MANY)]
    found: dict[str, list[dict[str, float]]] = {"beside 8 adapters": [], f"beside {MANY} adapters": []}
    for turn in range(rounds):
        for (name, runs), wanted in zip(found.items(), (names, everyone), strict=True):
            before = loads(server)
            runs.append(beside(server, model, 1000 + 10 * turn, wanted))
            runs[-1]["adapter_loads"] = loads(server) - before
            print("turns", name, runs[-1], flush=True)
    return {"case": f"the model itself, {BESIDE}", "medians": medians(found), "rounds": found}


def medians(found: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    return {
        name: {key: round(statistics.median(run[key] for run in runs), 2) for key in runs[0]}
        for name, runs in found.items()
    }


if __name__ == "__main__":
    main()
