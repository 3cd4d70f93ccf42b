"""run_batch: files of requests and answers, what is wrong with them, and going on after a stop."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from fakes.fake_core import FakeCore, fake_info
from messages import says
from server.live_server import MODEL, LiveServer
from sgl_jax.engine.messages import PoolingInfo
from sgl_jax.tools.batch.batch_command import main


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with LiveServer() as live:
        yield live


def chat(name: str, **body: object) -> dict:
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4} | body
    return {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}


def written(folder: Path, *lines: object) -> Path:
    path = folder / "in.jsonl"
    path.write_text("\n".join(each if isinstance(each, str) else json.dumps(each) for each in lines) + "\n")
    return path


def answers(path: Path) -> dict[str, dict]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({each["id"] for each in found}) == len(found)
    return {each["custom_id"]: each for each in found}


def run(folder: Path, server: LiveServer, *flags: str) -> int:
    return main(["-i", str(folder / "in.jsonl"), "-o", str(folder / "out.jsonl"), "--base-url", server.url, *flags])


def test_each_request_has_an_answer(tmp_path: Path, server: LiveServer) -> None:
    completion = {
        "custom_id": "c",
        "method": "POST",
        "url": "/v1/completions",
        "body": {"prompt": "a", "max_tokens": 2},
    }
    written(tmp_path, *(chat(f"r{i}") for i in range(20)), "", completion)
    assert run(tmp_path, server, "--concurrency", "3") == 0
    found = answers(tmp_path / "out.jsonl")
    assert set(found) == {"c", *(f"r{i}" for i in range(20))}
    assert all(each["response"]["status_code"] == 200 and each["error"] is None for each in found.values())
    assert found["c"]["response"]["body"]["object"] == "text_completion"
    assert found["r0"]["response"]["body"]["choices"][0]["message"]["role"] == "assistant"
    assert found["r0"]["response"]["request_id"]


def test_vectors_and_scores_are_answers_too(tmp_path: Path) -> None:
    bodies = {
        "/v1/embeddings": {"input": "a", "encoding_format": "base64"},
        "/v1/rerank": {"query": "a", "documents": ["b"]},
        "/v1/score": {"text_1": "a", "text_2": "b"},
    }
    lines = ({"custom_id": url, "method": "POST", "url": url, "body": body} for url, body in bodies.items())
    written(tmp_path, *lines)
    with LiveServer(lambda: FakeCore(fake_info(pooling=PoolingInfo("embed", 4)))) as vectors:
        assert run(tmp_path, vectors) == 0
    assert set(answers(tmp_path / "out.jsonl")) == {*bodies}


def test_mistakes_are_answers_that_name_them(tmp_path: Path, server: LiveServer) -> None:
    wrong = [
        chat("a", temperature=-1),
        chat("ok"),
        chat("ok"),
        chat("stream", stream=True),
        {**chat("url"), "url": "/v1/images"},
        {**chat("method"), "method": "GET"},
        '{"custom_id": "cut", "meth',
        {"custom_id": "body", "method": "POST", "url": "/v1/completions"},
    ]
    written(tmp_path, *wrong)
    assert run(tmp_path, server) == 1
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(found) == len(wrong)
    said = {each["custom_id"]: each["error"]["message"] for each in found if each["error"]}
    assert "line 3" in said["ok"]
    for name, text in (("stream", "stream"), ("url", "/v1/images"), ("method", "GET"), ("body", "body")):
        assert text in said[name]
    assert any(each["custom_id"] is None for each in found)  # the line that is no JSON
    by_name = {each["custom_id"]: each for each in found if each["response"]}
    assert by_name["a"]["response"]["status_code"] == 400
    assert by_name["a"]["response"]["body"]["error"]["param"] == "temperature"
    assert by_name["ok"]["response"]["status_code"] == 200


def test_a_run_goes_on_where_one_was_stopped(tmp_path: Path, server: LiveServer) -> None:
    written(tmp_path, *(chat(f"r{i}") for i in range(6)))
    assert run(tmp_path, server) == 0
    out = tmp_path / "out.jsonl"
    lines = out.read_text().splitlines(keepends=True)
    refused = json.loads(lines[1]) | {"response": None, "error": {"code": "no_answer", "message": "x"}}
    out.write_text(lines[0] + json.dumps(refused) + "\n" + lines[2] + lines[3][:30])
    assert run(tmp_path, server) == 0
    assert set(answers(out)) == {f"r{i}" for i in range(6)}
    assert out.read_text().startswith(lines[0] + lines[2])
    before = out.read_text()
    assert run(tmp_path, server) == 0
    assert out.read_text() == before


@pytest.mark.parametrize("mine", ['{"prompt": "mine"}\n', '{"prompt": "mine"}', "text"])
def test_another_file_is_not_written_over(tmp_path: Path, server: LiveServer, capsys, mine: str) -> None:
    written(tmp_path, chat("a"))
    out = tmp_path / "out.jsonl"
    out.write_text(mine)
    assert run(tmp_path, server) == 2
    assert out.read_text() == mine
    assert "choose another -o" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--base-url", "http://127.0.0.1:1", "--tp-size", "2"], "--tp-size"),
        (["--concurrency", "0"], "--concurrency"),
        (["--model-path", MODEL, "--page-siez", "2"], "--page-size"),
    ],
)
def test_flags_that_cannot_be_honoured_are_refused(tmp_path: Path, capsys, flags: list[str], said: str) -> None:
    written(tmp_path, chat("a"))
    assert main(["-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"), *flags]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_a_full_server_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sgl_jax.tools.batch.batch_command._MOST_WAIT_S", 0.02)
    written(tmp_path, *(chat(f"r{i}") for i in range(12)))
    with LiveServer(lambda: FakeCore(step_seconds=0.01), max_queued_requests=1) as full:
        assert run(tmp_path, full) == 0
    assert set(answers(tmp_path / "out.jsonl")) == {f"r{i}" for i in range(12)}


@pytest.mark.parametrize(("tries", "seconds"), [(3, 600.0), (120, 0.05)])
def test_a_server_that_stays_full_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, tries: int, seconds: float
) -> None:
    command = "sgl_jax.tools.batch.batch_command"
    for name, value in (("_MOST_WAIT_S", 0.02), ("_MOST_TRIES", tries), ("_MOST_S", seconds)):
        monkeypatch.setattr(f"{command}.{name}", value)
    written(tmp_path, *(chat(f"r{i}") for i in range(5)))
    with LiveServer(open_service=False) as closed:
        assert run(tmp_path, closed, "--concurrency", "2") == 1
    found = answers(tmp_path / "out.jsonl")
    assert set(found) == {f"r{i}" for i in range(5)}
    for each in found.values():
        assert (each["response"], each["error"]["code"]) == (None, "server_full")
        assert says(each["error"]["message"], f"503 … {tries} tries and {seconds:.0f} s … starting")
    said = capsys.readouterr().err
    assert says(said, f"5 failed … 5 … {tries} tries or {seconds:.0f} s")


def test_without_a_server_nothing_is_lost(tmp_path: Path, capsys) -> None:
    written(tmp_path, chat("a"))
    flags = ["-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl")]
    assert main([*flags, "--base-url", "http://127.0.0.1:1"]) == 1
    assert "no server answers" in capsys.readouterr().err
    assert main([*flags, "--model-path", MODEL, "--tokenizer-path", str(tmp_path)]) == 1
    assert "ended with code" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl").read_bytes() == b""


def test_a_server_is_started_and_ended(tmp_path: Path) -> None:
    requests = [chat(f"r{i}", temperature=0) for i in range(3)]
    path, template = written(tmp_path, *requests), Path(__file__).parents[2] / "server" / "plain_template.jinja"
    flags = ["--model-path", MODEL, "--chat-template", str(template), "--context-length", "128", "--api-key", "secret"]
    assert main(["-i", str(path), "-o", str(tmp_path / "out.jsonl"), *flags]) == 0
    contents = {
        each["response"]["body"]["choices"][0]["message"]["content"]
        for each in answers(tmp_path / "out.jsonl").values()
    }
    assert len(contents) == 1
