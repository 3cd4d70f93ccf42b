"""A short benchmark by guidellm's command line, which reads usage from every chunk of a stream."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from served import KEY, URL

GUIDELLM = Path(sys.executable).with_name("guidellm")


def benchmark(report: Path, backend: str) -> str:
    """Send four requests of 16 tokens, two at a time, and return what guidellm prints."""
    command = [GUIDELLM, "run", "--backend", f"kind=openai_http,target={URL},{backend}"]
    command += ["--profile", "kind=concurrent,streams=2", "--constraint", "kind=max_requests,count=4"]
    command += ["--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=16"]
    command += ["--tokenizer", "kind=huggingface_auto,model=tests/data/stories260k"]
    command += ["--output", f"kind=json,path={report}", "--disable-console"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=300)
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    "form",
    [
        "request_format=/v1/chat/completions,stream=true",
        "request_format=/v1/chat/completions,stream=false",
        "request_format=/v1/completions,stream=true",
    ],
)
def test_every_request_of_a_benchmark_is_counted(tmp_path, form):
    report = tmp_path / "report.json"
    printed = benchmark(report, f"api_key={KEY},{form}")
    assert report.exists(), printed
    requests = json.loads(report.read_text())["benchmarks"][0]["requests"]
    assert [len(requests[kind]) for kind in ("successful", "errored", "incomplete")] == [4, 0, 0]
    assert [request["output_metrics"]["text_tokens"] for request in requests["successful"]] == [16] * 4
    assert all(request["input_metrics"]["text_tokens"] >= 32 for request in requests["successful"])


def test_a_wrong_key_is_told(tmp_path):
    assert "401 Unauthorized" in benchmark(tmp_path / "report.json", "api_key=wrong")
