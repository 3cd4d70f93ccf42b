"""Long or hostile text costs the client who sent it: /health and others are answered meanwhile."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import httpx
import pytest
from live_server import MODEL, LiveServer

from messages import says
from sgl_jax.text.tokenizer import load_tokenizer

LONG = "Once upon a time " * 300_000  # 5.1 MB
MILLION = [5] * 1_000_000


def send_beside_health(live: LiveServer, path: str, body: dict[str, Any]) -> tuple[httpx.Response, list[float]]:
    """The answer, and how long /health took while it was awaited."""
    answers: list[httpx.Response] = []
    content = json.dumps(body).encode()

    def send() -> None:
        with live.http() as client:
            answers.append(client.post(path, content=content, headers={"Content-Type": "application/json"}))

    sender, waits = threading.Thread(target=send), []
    with live.http() as client:
        sender.start()
        while sender.is_alive():
            began = time.perf_counter()
            assert client.get("/health").status_code == 200
            waits.append(time.perf_counter() - began)
            time.sleep(0.01)
    sender.join()
    return answers[0], sorted(waits)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": LONG}, "prompt"),
        ("/v1/completions", {"prompt": ["a", LONG]}, "prompt"),
        ("/generate", {"text": LONG}, "text"),
        ("/generate", {"text": ["a", LONG]}, "text"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": LONG}]}, "messages"),
    ],
)
def test_a_text_that_no_context_holds_is_refused_before_it_is_encoded(
    live: LiveServer, path: str, body: dict[str, Any], param: str
) -> None:
    began = time.perf_counter()
    answer, waits = send_beside_health(live, path, body)
    assert time.perf_counter() - began < 5
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, param, "context_length_exceeded")
    assert says(error["message"], f"prompt is too long … {param} … 512 tokens … {512 * 7}")
    assert waits[-1] < 3.0  # other tests may hold both cores


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/completions", {"prompt": MILLION}, 400),
        ("/generate", {"input_ids": MILLION}, 400),
        ("/detokenize", {"tokens": MILLION}, 200),
        ("/tokenize", {"prompt": LONG[:2_000_000]}, 200),
        ("/tokenize", {"prompt": "a" * 7_000_001}, 400),
    ],
)
def test_a_million_tokens_hold_nobody_up(live: LiveServer, path: str, body: dict[str, Any], status: int) -> None:
    answer, waits = send_beside_health(live, path, body)
    assert answer.status_code == status
    assert waits[len(waits) // 2] < 0.3
    assert waits[-1] < 3.0  # other tests may hold both cores


def test_what_tokenize_counts_has_a_limit_of_its_own(http: httpx.Client) -> None:
    error = http.post("/tokenize", json={"prompt": "a" * 7_000_001}).json()["error"]
    assert says(error["message"], "prompt … 7000001 … 1000000 tokens … 7000000")


def test_a_template_that_never_ends_holds_up_only_its_own_requests() -> None:
    endless = "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}"
    with LiveServer() as live:
        live.service.tokenizer = load_tokenizer(MODEL, endless)
        body = {"messages": [{"role": "user", "content": "Hi"}]}
        answer, waits = send_beside_health(live, "/v1/chat/completions", body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")
        assert says(answer.json()["error"]["message"], "chat template … 3 s")
        assert waits[len(waits) * 99 // 100] < 0.5
        live.service.tokenizer = load_tokenizer(MODEL, "{{ messages[0].content }}")
        with live.http() as client:
            assert client.post("/tokenize", json=body).status_code == 200


def test_a_conversation_of_500_turns_is_served(http: httpx.Client) -> None:
    turns = [{"role": role, "content": "Hi"} for _ in range(250) for role in ("user", "assistant")]
    found = http.post("/tokenize", json={"messages": turns}).json()
    text = "<s>" + "".join(f"{turn['role']}: Hi\n" for turn in turns) + "assistant: "
    assert found["tokens"] == load_tokenizer(MODEL).encode(text, add_special_tokens=False)
