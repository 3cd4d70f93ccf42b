"""An answer as it is written, with the token counts at its end: `python examples/stream.py [base_url]`.

It needs the openai package: `pip install openai`.
"""

from __future__ import annotations

import sys

from openai import OpenAI

base_url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:30000/v1"
client = OpenAI(base_url=base_url, api_key="none")

stream = client.chat.completions.create(
    model="default",
    messages=[{"role": "user", "content": "Tell me a story about a lighthouse."}],
    max_tokens=100,
    seed=7,
    stream=True,
    stream_options={"include_usage": True},
)
for chunk in stream:
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    elif chunk.usage is not None:
        print(f"\n[{chunk.usage.prompt_tokens} prompt tokens, {chunk.usage.completion_tokens} generated]")
