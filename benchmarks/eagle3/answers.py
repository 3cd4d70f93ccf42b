"""Let a model answer prompts: the text that an EAGLE-3 head for it is trained on.

    python benchmarks/eagle3/answers.py --model .models/SmolLM2-135M-Instruct.Q4_1.gguf \\
        --prompts tests/data/datasets/sharegpt.json --out answers.jsonl

Held-out prompts are left out (prompts.py). Each line of the file has "prompt_ids" and "output_ids"; what the file has already is
not asked again.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

from prompts import is_held_out, read_prompts

import sgl_jax

BATCH = 256  # prompts whose answers are written together


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", type=Path, nargs="+", required=True, metavar="FILE")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--max-prompt-tokens", type=int, default=384, help="longer prompts are left out")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--rows", type=int, default=64, help="requests at a time")
    args = parser.parse_args()
    texts = dict.fromkeys(text for path in args.prompts for text in read_prompts(path) if not is_held_out(text))
    with sgl_jax.Engine(
        args.model,
        dtype="bfloat16",
        max_running_requests=args.rows,
        context_length=args.max_prompt_tokens + args.max_new_tokens,
    ) as engine:
        template = engine.tokenizer.chat_template()
        prompts = [_ids(engine, template.render([{"role": "user", "content": text}])) for text in texts]
        done = args.out.read_text().splitlines() if args.out.exists() else []
        prompts = [ids for ids in prompts if len(ids) <= args.max_prompt_tokens]
        random.Random(0).shuffle(prompts)
        prompts = prompts[len(done) :]
        params = {"temperature": args.temperature, "max_new_tokens": args.max_new_tokens}
        begin, num_tokens = time.monotonic(), 0
        for first in range(0, len(prompts), BATCH):
            batch = prompts[first : first + BATCH]
            outputs = [reply["output_ids"] for reply in engine.generate(input_ids=batch, sampling_params=params)]
            with args.out.open("a") as file:
                for prompt, output in zip(batch, outputs, strict=True):
                    file.write(json.dumps({"prompt_ids": prompt, "output_ids": output}) + "\n")
            num_tokens += sum(map(len, outputs))
            seconds = time.monotonic() - begin
            print(f"{first + len(batch)}/{len(prompts)} answers, {num_tokens} tokens, {seconds:.0f} s", flush=True)


def _ids(engine: sgl_jax.Engine, text: str) -> list[int]:
    return engine.tokenizer.encode(text, add_special_tokens=False)


if __name__ == "__main__":
    main()
