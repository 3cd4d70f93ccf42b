"""Many prompts at once, without a server: `python examples/offline_batch.py [model_path]`."""

from __future__ import annotations

import sys

import sgl_jax

model_path = sys.argv[1] if len(sys.argv) > 1 else ".models/SmolLM2-135M-Instruct.Q4_1.gguf"
countries = ["France", "Italy", "Japan", "Kenya", "Peru"]

with sgl_jax.Engine(model_path=model_path) as engine:
    prompts = [
        f"Question: What is the capital of {country}?\nAnswer: The capital of {country} is" for country in countries
    ]
    answers = engine.generate(prompts, {"max_new_tokens": 8, "temperature": 0, "stop": ["\n", "."]})
    for country, answer in zip(countries, answers, strict=True):
        print(f"{country}: {answer['text'].strip()} ({answer['meta_info']['completion_tokens']} tokens)")
