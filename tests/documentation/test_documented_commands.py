"""Every command of the documentation is one that works here, as are those of the published page of SGLang for TPUs.

Flags are read by the programs themselves, which are stopped where their work begins.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import inspect
import itertools
import json
import os
import re
import shlex
import tomllib
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock
from urllib.parse import urlsplit

import first_day
import pydantic
import pytest
import shell_lines
from shell_lines import REPOSITORY, Command

from sgl_jax.__main__ import VERBS
from sgl_jax.observability import log
from sgl_jax.server.app import create_routes
from sgl_jax.server.app_state import ServerState
from sgl_jax.server.bodies import Body
from sgl_jax.settings import speculators
from sgl_jax.settings.server_args import ServerArgs
from sgl_jax.tools.batch import batch_command
from sgl_jax.tools.benchmark.arguments import TOOLS, server_arguments
from sgl_jax.tools.benchmark.terminal import BenchmarkError
from sgl_jax.tools.chat import chat_command
from sgl_jax.tools.environment import check_command

PAGES = [command for page in shell_lines.pages() for command in shell_lines.in_blocks(page)]
SENTENCES = [command for page in shell_lines.pages() for command in shell_lines.in_sentences(page)]
PUBLISHED = [*shell_lines.read(Path(__file__).with_name("published.sh").read_text(encoding="utf-8"), "published.sh")]
MAKEFILE = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((REPOSITORY / "python" / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SERVING_FLAGS = {name for names, *_ in TOOLS["bench_serving"].flags for name in names.split()}
BAD_USE = 2  # exit code
# Modules of others that may be run.
INSTALLED = {"pytest", "pip", "uvicorn"}


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop every program when its command line is read."""
    monkeypatch.setattr(log, "setup", lambda *_: None)
    is_there = os.path.isdir
    monkeypatch.setattr(os.path, "isdir", lambda path: path == "/adapters" or is_there(path))  # an example in a page
    monkeypatch.setattr(speculators, "with_verifier", lambda args: args)
    for place in ("server.lifecycle.serve", "engine.follower_loop.follow"):
        monkeypatch.setattr(f"sgl_jax.{place}", lambda *_: 0)
    for name in ("compile_here", "compile_for"):
        monkeypatch.setattr(f"sgl_jax.planning.compile_command.{name}", lambda *_, **__: 0)
    for tool in TOOLS.values():
        monkeypatch.setattr(f"sgl_jax.tools.benchmark.{tool.module}.main", measure_nothing)
    monkeypatch.setattr(check_command, "check_env", lambda _: SimpleNamespace(usable=()))
    monkeypatch.setattr(batch_command.asyncio, "run", lambda work: work.close() or 0)
    for peer in ("ServerPeer", "EnginePeer"):
        monkeypatch.setattr(chat_command, peer, lambda *_: SimpleNamespace(close=lambda: None))
    monkeypatch.setattr(chat_command, "ChatLoop", lambda _: SimpleNamespace(run=lambda: 0))


def measure_nothing(_: argparse.Namespace, rest: Sequence[str]) -> int:
    if rest:
        server_arguments(rest)
    return 0


def check(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise AssertionError for a command that would be refused, or that names what is not there."""
    for variable, value in command.environ.items():
        monkeypatch.setenv(variable, value)
    match command.program, command.words[1:]:
        case "python" | "python3", words:
            check_python([*words])
        case "sgl-jax", words:
            assert program("sgl_jax.__main__").main([*words]) != BAD_USE
        case "make", words:
            check_make(words)
        case "curl", words:
            check_curl(words)
        case "uv" | "pip", words:
            check_install(words)
        case _, words:
            assert [word for word in words if word.startswith("deploy/") and not (REPOSITORY / word).exists()] == []
            if command.program == "docker" and words[0] == "run":
                check_container(words)


def program(module: str) -> Any:
    return importlib.import_module(module)


def check_python(words: list[str]) -> None:
    if words[0] == "-u":
        words = words[1:]
    if words[0] == "-c":
        check_source(words[1])
    elif words[0] != "-m":
        check_script(words)
    elif words[1].partition(".")[0] == "sgl_jax":
        module = f"{words[1]}.__main__" if words[1] == "sgl_jax" else words[1]
        assert program(module).main(words[2:]) != BAD_USE
    else:
        assert words[1] in INSTALLED
        assert [each for each in words[2:] if each.startswith("tests/") and not exists(each)] == []


def exists(path: str) -> bool:
    return (REPOSITORY / path.partition("::")[0]).exists()


def check_script(words: Sequence[str]) -> None:
    """Look for a script's file, and for each flag in it or in a module beside it."""
    script = REPOSITORY / words[0]
    assert script.is_file()
    if script.name == "first_day.py":  # takes flags of the server
        first_day.parse(words[1:])
        return
    source = "\n".join(file.read_text(encoding="utf-8") for file in script.parent.glob("*.py"))
    flags = [word for word in words if re.match("--[a-z]", word)]
    unknown = [word for word in flags if f'"{word.partition("=")[0]}"' not in source]
    if "bench_serving" in source:  # sweep.py hands them on
        unknown = [word for word in unknown if word not in SERVING_FLAGS]
    assert unknown == []


def check_make(words: Sequence[str]) -> None:
    assert words
    for word in words:
        variable, is_set, _ = word.partition("=")
        wanted = rf"^{re.escape(variable)} *[:?]?=" if is_set else rf"^{re.escape(word)}( [\w$(){{}}.-]+)*:"
        assert (is_set and f"$({variable})" in MAKEFILE) or re.search(wanted, MAKEFILE, re.MULTILINE), word


def check_install(words: Sequence[str]) -> None:
    """Look for the local packages and files of an installation, and for the extras that are asked for."""
    for word in words:
        local = re.fullmatch(r"(?:\./)?(python)(?:\[([\w,]+)\])?", word)
        if local:
            assert {*(local[2] or "cpu").split(",")} <= PROJECT["optional-dependencies"].keys()
        elif "/" in word and not word.startswith(("/", "http", "sgl-jax[")):
            assert exists(word), word


def check_container(words: Sequence[str]) -> None:
    for index, word in enumerate(words):
        if re.match(r"sgl-jax(:|$)", word):
            ServerArgs.from_cli(words[index + 1 :], {})


def bodies(kind: type[Body] = Body) -> dict[str, type[Body]]:
    found = {kind.__name__: kind}
    for each in kind.__subclasses__():
        found |= bodies(each)
    return found


PATHS = create_routes(ServerState(MagicMock(), ServerArgs(model_path="m"))).openapi()["paths"]


def check_curl(words: Sequence[str]) -> None:
    """Check the path, the method and the body of a request against the server's routes."""
    options = dict(itertools.pairwise(words))
    (url,) = (word for word in words if re.match(r"(https?://)?[\w.]+:\d+/|https?://", word))
    path = urlsplit(url if "//" in url else f"http://{url}").path
    body = next((options[name] for name in ("-d", "--data", "--json") if name in options), None)
    method = options.get("-X", "GET" if body is None else "POST").lower()
    assert method in PATHS.get(path, {}), f"{method} {path}"
    if body is not None:
        assert (
            "application/json" in options.get("-H", "")
            or "--json" in options
            or "Content-Type: application/json" in words
        )
        schema = PATHS[path][method]["requestBody"]["content"]["application/json"]["schema"]
        reference = schema.get("$ref") or schema["anyOf"][0]["$ref"]
        bodies()[reference.rpartition("/")[2]].model_validate(json.loads(body))


def check_source(source: str) -> None:
    """Compile a snippet, and look for what it imports and for what it calls of our package."""
    from sgl_jax import Engine, SamplingParams

    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert [each.name for each in node.names if importlib.util.find_spec(each.name) is None] == []
        if isinstance(node, ast.ImportFrom) and node.module:
            module = importlib.import_module(node.module)
            missing = [each.name for each in node.names if not hasattr(module, each.name)]
            assert [each for each in missing if importlib.util.find_spec(f"{node.module}.{each}") is None] == []
        if isinstance(node, ast.Call):
            match ast.unparse(node.func).split("."):
                case ["sgl_jax", "Engine"] | ["Engine"]:
                    check_keywords(node, ServerArgs)
                case ["SamplingParams"]:
                    check_keywords(node, SamplingParams)
                case ["engine", method]:
                    assert hasattr(Engine, method), method


def check_keywords(call: ast.Call, kind: type) -> None:
    assert [each.arg for each in call.keywords if each.arg not in inspect.signature(kind).parameters] == []


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize("command", [*PAGES, *PUBLISHED], ids=str)
def test_commands_are_taken(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    check(command, monkeypatch)


def test_the_pages_are_read() -> None:
    assert len(PAGES) > 90
    assert {command.program for command in PAGES} >= {"python", "make", "curl", "docker", "kubectl", "sky", "uv", "pip"}
    assert len(PUBLISHED) == 14


@pytest.mark.parametrize("command", SENTENCES, ids=str)
def test_commands_in_sentences_name_what_is_there(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may be unfinished, so flags of our programs are not read."""
    if command.program == "python" and command.words[1:2] == ("-m",):
        assert importlib.util.find_spec(command.words[2])
    elif command.program == "sgl-jax":
        assert command.words[1] in {"VERB", *(verb.partition(" ")[0] for verb in VERBS)}
    elif "-N" not in command.words[-1:]:
        check(command, monkeypatch)


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize("page", ["README.md", "docs/recipes.md"])
def test_flags_that_are_offered_are_taken(page: str) -> None:
    lines = [span for span in shell_lines.spans(REPOSITORY / page) if re.match(r"--\w[\w-]* [^…]+$", span)]
    assert len(lines) > 6
    for line in lines:
        model = [] if "--model-path" in line else ["--model-path", "m"]
        ServerArgs.from_cli([*model, *shlex.split(line)], {})


@pytest.mark.parametrize("page", shell_lines.pages(), ids=shell_lines.name)
def test_python_snippets_use_what_exists(page: Path) -> None:
    for snippet in re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        check_source(snippet)


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize(
    "line",
    [
        "python -m sgl_jax.launch_server --model-path m --page-sise 16",
        "python -m sgl_jax.bench_serving --no-such-flag",
        "python -m sgl_jax.bench_one_batch --model-path m --page-size 3",
        "python -m sgl_jax.compile --plan",
        "python -m sgl_jax.check_env --no-such-flag",
        "python -m sgl_jax.run_batch -i in.jsonl -o out.jsonl --model-path m --page-size 3",
        "python benchmarks/plot.py --no-such-flag",
        "python benchmarks/none.py",
        "python benchmarks/first_day.py --out o.json --page-sise 16",
        "make no-such-rule",
        "make test NO_SUCH_VARIABLE=1",
        'uv pip install -e "python[none]"',
        "docker build -f deploy/none .",
        "docker run sgl-jax --no-such-flag",
        "curl http://127.0.0.1:30000/none",
        "curl -X POST http://127.0.0.1:30000/metrics",
        "curl http://127.0.0.1:30000/tokenize -H 'Content-Type: application/json' -d '{\"promt\": \"a\"}'",
        'python -c "from sgl_jax import Motor"',
        'python -c "import sgl_jax; sgl_jax.Engine(modell_path=1)"',
    ],
)
def test_the_check_sees_mistakes(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (command,) = shell_lines.read(line, "here")
    with pytest.raises((AssertionError, ValueError, BenchmarkError, pydantic.ValidationError, ImportError)):
        check(command, monkeypatch)


def test_commands_go_on_over_lines_and_end_at_operators() -> None:
    text = "A=1 curl x:1/y \\\n  -d '{\n}' | head   # why\noutput here\nmake a && git status\n"
    found = [(command.place, command.words, command.environ) for command in shell_lines.read(text, "p", 5)]
    assert found == [
        ("p:5", ("curl", "x:1/y", "-d", "{\n}"), {"A": "1"}),
        ("p:9", ("make", "a"), {}),
        ("p:9", ("git", "status"), {}),
    ]
