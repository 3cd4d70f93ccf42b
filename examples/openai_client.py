"""A chat with any sgl_jax server through the openai package: `python examples/openai_client.py [base_url]`.

It needs the openai package: `pip install openai`.
"""

from __future__ import annotations

import sys

from openai import OpenAI

base_url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:30000/v1"
client = OpenAI(base_url=base_url, api_key="none")

answer = client.chat.completions.create(
    model="default",
    messages=[{"role": "user", "content": "What is the capital of France?"}],
    temperature=0,
    max_tokens=32,
)
print(answer.choices[0].message.content)
print(answer.usage)
