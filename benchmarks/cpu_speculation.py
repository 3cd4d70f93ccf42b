"""Measure speculative decoding on a CPU: one server with it and one without, the same client and prompts, in turn.

    python benchmarks/cpu_speculation.py --model .models/SmolLM2-135M-Instruct.Q4_1.gguf \\
        --flags "--speculative-algorithm NGRAM" --out benchmarks/cpu/speculation_ngram.json

The task "edit" asks to repeat a text with one word replaced, as an editor's assistant does: much of the answer stands in the
prompt. The task "chat" asks questions, whose answers do not. --prompts FILE makes a task of the file's held-out prompts, which
no head was trained on (eagle3/prompts.py). While one server is measured, the other is stopped with SIGSTOP.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cpu_servers import Server, start, wait_compiled, wait_ready
from eagle3.prompts import is_held_out, read_prompts
from provenance import commit, machine

PAUSE_S = 0.5
TOKENS = 96  # in each answer
REQUESTS = 12  # least number in a measurement: the first one after a pause is slower
CONCURRENCY = (1, 4, 16)
NAMES = ("Anna", "Boris", "Clara", "David", "Elena", "Felix", "Greta", "Hugo")
PLACES = ("harbour", "market", "library", "station", "garden", "bridge", "museum", "bakery")
QUESTIONS = (
    "Why is the sky blue?",
    "How does a bicycle stay upright?",
    "What is a good way to learn to cook?",
    "Tell a short story about a lighthouse keeper.",
    "Explain how rain forms.",
    "What should I see in Rome in a day?",
    "Write a poem about autumn.",
    "How do vaccines work?",
)


def edit_prompt(number: int) -> str:
    """Return a prompt that asks for a text again with one word replaced; every number gives another text."""
    name, place = NAMES[number % 8], PLACES[number // 8 % 8]
    text = (
        f"def visit_{place}(person, hours):\n"
        f'    """Record that {name} was at the {place}, and for how long."""\n'
        f"    total_hours = person.hours_at_{place} + hours\n"
        f"    person.hours_at_{place} = total_hours\n"
        f'    print("{name} was at the {place} for", total_hours, "hours")\n'
        f"    return total_hours\n"
    )
    return f"Repeat this code exactly:\n\n{text}\n"


def chat_prompt(number: int) -> str:
    return f"{QUESTIONS[number % 8]} Answer number {number}."


TASKS = {"edit": edit_prompt, "chat": chat_prompt}


def prompts_of(path: Path) -> Callable[[int], str]:
    """Return the held-out prompts of a file, over and over."""
    held_out = [prompt for prompt in read_prompts(path) if is_held_out(prompt)]
    return lambda number: held_out[number % len(held_out)]


def ask(server: Server, prompt: str, ignore_eos: bool) -> int:
    """Send a chat request and return how many tokens the answer has."""
    body = {
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": TOKENS,
        "ignore_eos": ignore_eos,
    }
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.port}/v1/chat/completions",
        json.dumps(body | {"model": "m"}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=600) as answer:
        return json.load(answer)["usage"]["completion_tokens"]


def measure(server: Server, task: Callable[[int], str], concurrency: int, first: int) -> float:
    """Return output tokens per second of 3 rounds of `concurrency` requests at once, or more."""
    number = max(REQUESTS, 3 * concurrency)
    prompts, made_up = [task(first + i) for i in range(number)], task in TASKS.values()
    with ThreadPoolExecutor(concurrency) as threads:
        begin = time.perf_counter()
        tokens = sum(threads.map(lambda prompt: ask(server, prompt, ignore_eos=made_up), prompts))
        return tokens / (time.perf_counter() - begin)


def drafts(server: Server) -> tuple[int, int]:
    """Return how often a row's drafts were verified, and how many were accepted, once the server has said so."""
    time.sleep(PAUSE_S)
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/get_server_info", timeout=30) as answer:
        totals = json.load(answer)["internal_states"][0]
        return totals["draft_steps"], totals["accepted_drafts"]


def compare(
    servers: dict[str, Server], task: Callable[[int], str], concurrency: int, turns: int, first: int
) -> dict[str, Any]:
    """Measure both servers in turn."""
    speeds: dict[str, list[float]] = {"off": [], "on": []}
    before = drafts(servers["on"])
    for turn in range(turns):
        for name, other in (("off", "on"), ("on", "off")):
            servers[other].signal(signal.SIGSTOP)
            time.sleep(PAUSE_S)
            speeds[name].append(measure(servers[name], task, concurrency, first + 100 * turn))
            servers[other].signal(signal.SIGCONT)
    steps, accepted = (now - then for now, then in zip(drafts(servers["on"]), before, strict=True))
    return {
        "tokens_per_s": {name: round(statistics.median(values), 1) for name, values in speeds.items()},
        "ratio": round(statistics.median(on / off for on, off in zip(speeds["on"], speeds["off"], strict=True)), 3),
        "accept_length": round(1 + accepted / steps, 2) if steps else None,
        "steps_with_drafts": steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--flags", required=True, help="flags of the server that speculates")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tasks", nargs="*", default=[*TASKS], choices=[*TASKS])
    parser.add_argument("--prompts", type=Path, nargs="+", default=[], metavar="FILE")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    base = [sys.executable, "-m", "sgl_jax.launch_server", "--model-path", str(args.model), "--dtype", args.dtype]
    base += ["--served-model-name", "m", "--context-length", "2048", "--host", "127.0.0.1", "--port"]
    logs = Path(tempfile.gettempdir())
    commands = {"off": [*base, "8311"], "on": [*base, "8312", *args.flags.split()]}
    tasks = {name: TASKS[name] for name in args.tasks} | {
        f"{path.parent.name}/{path.stem}": prompts_of(path) for path in args.prompts
    }
    servers: dict[str, Server] = {}
    found = []
    try:
        for (name, command), port in zip(commands.items(), (8311, 8312), strict=True):
            servers[name] = start(name, command, port, logs / f"speculation_{name}.log")
            wait_ready(servers[name])
            wait_compiled(servers[name])
            ask(servers[name], "Hello", ignore_eos=False)
        for number, (task, concurrency) in enumerate((t, c) for t in tasks for c in CONCURRENCY):
            result = {"task": task, "concurrency": concurrency}
            result |= compare(servers, tasks[task], concurrency, args.rounds, 1000 * number)
            print(result, flush=True)
            found.append(result)
    finally:
        for server in servers.values():
            server.signal(signal.SIGCONT)
            server.signal(signal.SIGTERM)
    about = {
        "commit": commit(),
        "machine": machine(),
        "model": args.model.name,
        "dtype": args.dtype,
        "flags": args.flags,
    }
    args.out.write_text(json.dumps(about | {"results": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
