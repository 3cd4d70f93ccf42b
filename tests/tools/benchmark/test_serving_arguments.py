"""Flags: what is published parses, what cannot be honoured is refused by name, and --help is instant."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from sgl_jax.bench_serving import main
from sgl_jax.tools.benchmark.arguments import TOOLS, parse
from sgl_jax.tools.benchmark.client import base_url
from sgl_jax.tools.benchmark.protocols import BACKENDS, CHAT, COMPLETIONS, NATIVE


def parse_serving(argv: Sequence[str]) -> argparse.Namespace:
    return parse("bench_serving", argv)[0]


PUBLISHED = [
    "--backend sgl-jax --dataset-name random --num-prompts=100 --random-input=512 --random-output=128 "
    "--max-concurrency=8 --random-range-ratio=1 --warmup-requests=0",
    "--backend sgl-jax --base-url http://127.0.0.1:30271 --model /models/M --dataset-name random "
    "--random-input-len 16384 --random-output-len 4096 --random-range-ratio 1 --max-concurrency 32 --num-prompts 96 "
    "--warmup-requests 0 --output-file out.jsonl",
    "--backend sgl-jax --host 127.0.0.1 --port 30271 --dataset-name random --random-input-len 4096 "
    "--random-output-len 1024 --random-range-ratio 1.0 --flush-cache --seed 12345 --request-rate 100 "
    "--num-prompts 256 --max-concurrency 128",
    "--backend sgl-jax --model org/Name --tokenizer org/Name --host 127.0.0.1 --port 30000 --dataset-name random "
    "--random-input-len 1000 --random-output-len 1000 --num-prompts 80 --max-concurrency 16 --seed 42",
    "--backend sglang --dataset-name sharegpt --dataset-path sharegpt.json --num-prompts 3000 --output-file offline.jsonl",
    "--backend sglang-oai-chat --dataset-name generated-shared-prefix --gsp-num-groups 4 --gsp-prompts-per-group 2",
    "--backend vllm --dataset-name random --num-prompts 1000 --random-input 4096 --random-output 2048 --output-file a.jsonl",
    "--backend sgl-jax --dataset-name mooncake --dataset-path trace.jsonl --use-trace-timestamps --disable-tqdm",
]


@pytest.mark.parametrize("line", PUBLISHED)
def test_published_command_lines_parse(line: str) -> None:
    args = parse_serving(shlex.split(line))
    assert args.backend in BACKENDS


def test_the_documentations_command_lines_parse() -> None:
    page = Path(__file__).parents[3] / "docs" / "features" / "benchmarking.md"
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"^python -m sgl_jax.bench_serving (-.*)$", text, re.MULTILINE)
    assert lines
    for line in lines:
        parse_serving(shlex.split(line))


@pytest.mark.parametrize(
    ("line", "url"),
    [
        ("", "http://127.0.0.1:30000"),
        ("--backend vllm", "http://127.0.0.1:8000"),
        ("--backend lmdeploy-chat --host h", "http://h:23333"),
        ("--backend vllm --port 81", "http://127.0.0.1:81"),
        ("--host ::1", "http://[::1]:30000"),
        ("--base-url https://h/x/ --port 81", "https://h/x"),
    ],
)
def test_where_the_server_is(line: str, url: str) -> None:
    assert base_url(parse_serving(line.split())) == url


def test_which_api_a_backend_has() -> None:
    apis = {name: backend.protocol for name, backend in BACKENDS.items()}
    assert {name for name, api in apis.items() if api is NATIVE} == {"sgl-jax", "sglang", "sglang-native"}
    assert {name for name, api in apis.items() if api is CHAT} == {name for name in BACKENDS if name.endswith("-chat")}
    assert apis["vllm"] is apis["openai"] is apis["sgl-jax-oai"] is COMPLETIONS


def test_headers_are_taken_one_by_one_and_together() -> None:
    args = parse_serving(["--header", "A=1", "B=2=3", "--header", "Authorization=Bearer key"])
    assert args.header == ["A=1", "B=2=3", "Authorization=Bearer key"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--backend trt", "--backend: invalid choice: 'trt' (choose from sgl-jax, sgl-jax-oai,"),
        ("--no-such-flag", "--no-such-flag is not a flag; --help lists them all"),
        ("--num-prompt-s 3", "--num-prompt-s is not a flag, did you mean --num-prompts?"),
        ("--flush-cache yes", "--flush-cache takes no value"),
        ("--flush-cache=yes", "--flush-cache takes no value"),
        ("yes --flush-cache", "'yes' follows no flag; every value needs one"),
        ("--request-rate 0", "--request-rate: '0' is not a number above 0"),
        ("--request-rate fast", "--request-rate: 'fast' is not a number above 0"),
        ("--max-concurrency 0", "--max-concurrency: '0' is not a whole number from 1 on"),
        ("--warmup-requests -1", "--warmup-requests: '-1' is not a whole number from 0 on"),
        ("--temperature nan", "--temperature: 'nan' is not a number from 0 on"),
        ("--extra-request-body [1]", "--extra-request-body: '[1]' is not a JSON object"),
        ("--extra-request-body {a", "--extra-request-body: '{a' is not a JSON object"),
        ("--header Key", "--header: 'Key' is not NAME=VALUE"),
        ("--header =x", "--header: '=x' is not NAME=VALUE"),
        ("--base-url host:1", "--base-url: 'host:1' is not a URL that begins with http:// or https://"),
        ("--request-rate 1 --use-trace-timestamps", "--use-trace-timestamps and --request-rate both say when to send"),
        ("--profile-num-steps 3", "--profile-num-steps needs --profile"),
        ("--output-details", "--output-details needs --output-file"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(line.split()) == 2
    said = capsys.readouterr().err
    assert (
        said.replace("'sgl-jax'", "sgl-jax")
        .replace("'sgl-jax-oai'", "sgl-jax-oai")
        .startswith(f"bench_serving: error: {message}")
    )
    assert said.count("\n") == 1


@pytest.mark.parametrize("tool", TOOLS)
def test_help_loads_nothing_heavy(tool: str) -> None:
    check = (
        f"import sys\nfrom sgl_jax.{tool} import main\n"
        "try: main(['--help'])\nexcept SystemExit as end: assert end.code == 0\n"
        "print([name for name in ('jax', 'aiohttp', 'numpy', 'tokenizers', 'matplotlib') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.startswith(f"usage: python -m sgl_jax.{tool} ")
    assert result.stdout.splitlines()[-1] == "[]"
