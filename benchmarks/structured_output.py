"""Generations of a model with random weights under JSON schemas: how many are valid, and what masks cost.

python benchmarks/structured_output.py --generations 10000
python benchmarks/structured_output.py --throughput .models/SmolLM2-135M-Instruct.Q4_1.gguf

Every answer that ends must be valid. An answer is cut at --max-tokens where its schema bounds neither texts nor lists.
With --throughput, 32 requests of a usual schema are served in turn with 32 of the same lengths without one.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path

import jsonschema_rs
import numpy as np

import sgl_jax

DATA = Path(__file__).resolve().parents[1] / "tests" / "data"
BATCH = 250  # requests of a call
BOUNDED = [
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 10},
            "tags": {"type": "array", "items": {"enum": ["a", "bc", "d"]}, "maxItems": 3},
            "more": {"anyOf": [{"type": "null"}, {"type": "integer", "minimum": 0, "maximum": 99}]},
        },
        "required": ["name", "tags", "more"],
        "additionalProperties": False,
    },
    {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 5},
]

USUAL = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "city": {"type": "string", "maxLength": 40},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 20}, "minItems": 2, "maxItems": 4},
        "kind": {"enum": ["person", "company", "place"]},
    },
    "required": ["name", "age", "city", "tags", "kind"],
    "additionalProperties": False,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generations", type=int, default=500)
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--throughput", metavar="MODEL", help="measure this model's tokens/s with and without a schema")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if args.throughput:
        print(json.dumps({"ratios": throughput(args.throughput, args.rounds)}))
        return
    cases = json.loads((DATA / "schema_cases" / "practice.json").read_text(encoding="utf-8"))["cases"]
    schemas = [*BOUNDED, *(case["schema"] for case in cases)]
    valid = [jsonschema_rs.validator_for(schema).is_valid for schema in schemas]
    counts: Counter[str] = Counter()
    seconds = {"with schemas": 0.0, "without": 0.0}
    num_tokens = dict.fromkeys(seconds, 0)
    options = {"load_format": "dummy", "context_length": 512, "max_running_requests": 32, "random_seed": 0}
    with sgl_jax.Engine(str(DATA / "stories260k"), **options) as engine:
        for first in range(0, args.generations, BATCH):
            numbers = range(first, min(first + BATCH, args.generations))
            common = {"max_new_tokens": args.max_tokens, "temperature": 1.0}
            asked = [common | {"sampling_seed": i, "json_schema": schemas[i % len(schemas)]} for i in numbers]
            replies, seconds_now = timed(engine, asked)
            seconds["with schemas"] += seconds_now
            lengths = [len(reply["output_ids"]) for reply in replies]
            num_tokens["with schemas"] += sum(lengths)
            for i, reply in zip(numbers, replies, strict=True):
                if reply["meta_info"]["finish_reason"]["type"] != "stop":
                    counts["cut" if i % len(schemas) >= len(BOUNDED) else "endless"] += 1
                else:
                    ok = is_valid(valid[i % len(schemas)], reply["text"])
                    counts["valid" if ok else "invalid"] += 1
            plain = [common | {"sampling_seed": i, "ignore_eos": True} for i in numbers]
            plain = [each | {"max_new_tokens": length} for each, length in zip(plain, lengths, strict=True)]
            _, seconds_now = timed(engine, plain)
            seconds["without"] += seconds_now
            num_tokens["without"] += sum(lengths)
    rates = {name: round(num_tokens[name] / seconds[name]) for name in seconds}
    print(json.dumps({"generations": dict(counts), "tokens_per_second": rates}))


def throughput(model: str, rounds: int) -> list[float]:
    """Return the tokens/s under a schema divided by those without, of each round."""
    schema = json.dumps(USUAL)
    prompts = [[1, *np.random.default_rng(i).integers(100, 40000, 60).tolist()] for i in range(32)]
    options = {"dtype": "bfloat16", "max_running_requests": 32, "context_length": 1024, "random_seed": 0}
    ratios = []
    with sgl_jax.Engine(model, **options) as engine:
        for _ in range(rounds + 1):  # in the first, programs are still compiled beside
            common = [{"max_new_tokens": 150, "temperature": 1.0, "sampling_seed": i} for i in range(32)]
            replies, bound = timed(engine, [each | {"json_schema": schema} for each in common], prompts)
            lengths = [len(reply["output_ids"]) for reply in replies]
            free = [each | {"max_new_tokens": n, "ignore_eos": True} for each, n in zip(common, lengths, strict=True)]
            _, plain = timed(engine, free, prompts)
            ratios.append(round(plain / bound, 3))
    return ratios[1:]


def timed(
    engine: sgl_jax.Engine, params: list[dict], prompts: list[list[int]] | None = None
) -> tuple[list[dict], float]:
    start = time.perf_counter()
    prompts = prompts or [[1, 300 + i % 100] for i in range(len(params))]
    replies = engine.generate(input_ids=prompts, sampling_params=params)
    return replies, time.perf_counter() - start


def is_valid(check, text: str) -> bool:
    """Whether a text is JSON of its schema. A number beyond the range of float64 is one all the same."""
    try:
        return check(json.loads(text, parse_float=lambda number: max(-1e308, min(1e308, float(number)))))
    except ValueError:
        return False


if __name__ == "__main__":
    main()
