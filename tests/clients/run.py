"""Client libraries, as their registries have them today, against a server: `make test-clients`, or `ONLY="litellm llm"`.

Each client is installed into an environment of its own, which is deleted after its checks. They run against one server of
stories260k with an API key. `make test` has none of this: it downloads some gigabytes, and fails when a client changes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from sgl_jax.text.chat_template import bundled_templates

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
KEY = "sesame"
START_TIMEOUT_S = 300

PYTHON_CLIENTS = {  # packages of each, beside pytest
    "openai": ["openai"],
    "instructor": ["instructor"],
    "pydantic_ai": ["pydantic-ai-slim[openai]"],
    "agents": ["openai-agents"],
    "anthropic": ["anthropic"],
    "litellm": ["litellm"],
    "langchain": ["langchain-openai"],
    "llm": ["llm"],
    "llama_index": ["llama-index-llms-openai-like"],
    "huggingface_hub": ["huggingface-hub"],
    "lm_eval": ["lm-eval[api]", "transformers"],
    "guidellm": ["guidellm"],
    "embeddings": ["openai", "cohere", "langchain-openai", "litellm"],
    "llama_index_embeddings": ["llama-index-embeddings-openai-like"],
}
NODE_CLIENTS = {"openai_node": ["openai"], "ai_sdk": ["ai", "@ai-sdk/openai-compatible"]}


_EMBEDS = "tests/data/embed/qwen3-embedding"
MODELS = {"embeddings": _EMBEDS, "llama_index_embeddings": _EMBEDS}  # for those that need another one than stories260k


@contextlib.contextmanager
def server(log: Path, model: str) -> Iterator[str]:
    """Serve a model as stories260k with a key on a free port and yield its URL."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "sgl_jax.launch_server",
        "--model-path",
        model,
        "--device",
        "cpu",
    ]
    command += ["--served-model-name", "stories260k", "--dtype", "float32", "--context-length", "512"]
    template = bundled_templates()["chatml"] + "{% if tools %}{% endif %}"  # shows none: they would fill the context
    command += ["--chat-template", template, "--api-key", KEY, "--port", str(port)]
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=out, stderr=subprocess.STDOUT)
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_TIMEOUT_S
    try:
        while not is_ready(url):
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"the server did not start:\n{log.read_text()}")
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def is_ready(url: str) -> bool:
    with contextlib.suppress(urllib.error.URLError), urllib.request.urlopen(f"{url}/ready") as answer:
        return answer.status == 200
    return False


def check_in_python(name: str, folder: Path, environment: dict[str, str]) -> str:
    python = str(folder / "bin" / "python")
    subprocess.run(["uv", "venv", "--quiet", "--python", sys.executable, str(folder)], check=True)
    install = ["uv", "pip", "install", "--quiet", "--python", python, "pytest", *PYTHON_CLIENTS[name]]
    pytest = [python, "-m", "pytest", "-q", "--disable-warnings", "-p", "no:cacheprovider", "--noconftest"]
    return outcome(install, [*pytest, "-c", os.devnull, str(HERE / f"with_{name}.py")], REPOSITORY, environment)


def check_in_node(name: str, folder: Path, environment: dict[str, str]) -> str:
    if not shutil.which("npm"):
        return "skipped: there is no npm"
    folder.mkdir()
    for file in (f"with_{name}.mjs", "served.mjs"):  # a module finds the packages beside it
        shutil.copy(HERE / file, folder)
    install = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(folder), *NODE_CLIENTS[name]]
    return outcome(install, ["node", "--test", f"with_{name}.mjs"], folder, environment)


def outcome(install: list[str], check: list[str], folder: Path, environment: dict[str, str]) -> str:
    if subprocess.run(install, check=False).returncode:
        return "skipped: it could not be installed"
    return "passed" if subprocess.run(check, cwd=folder, env=environment, check=False).returncode == 0 else "FAILED"


def main() -> None:
    names = sys.argv[1:] or [*PYTHON_CLIENTS, *NODE_CLIENTS]
    if unknown := [name for name in names if name not in PYTHON_CLIENTS | NODE_CLIENTS]:
        sys.exit(f"unknown clients: {unknown}; there are {[*PYTHON_CLIENTS, *NODE_CLIENTS]}")
    results = {}
    with tempfile.TemporaryDirectory() as place:
        by_model: dict[str, list[str]] = {}
        for name in names:
            by_model.setdefault(MODELS.get(name, "tests/data/stories260k"), []).append(name)
        for model, clients in by_model.items():
            log = Path(place) / "log"
            with server(log, model) as url:
                environment = os.environ | {"SERVER_URL": url, "SERVER_KEY": KEY}
                for name in clients:
                    print(f"== {name}", flush=True)
                    check = check_in_python if name in PYTHON_CLIENTS else check_in_node
                    results[name] = check(name, Path(place) / name, environment)
                    shutil.rmtree(Path(place) / name, ignore_errors=True)
            said = "FAILED: it has a traceback" if "Traceback" in log.read_text() else "passed"
            results[f"the server's log with {model}"] = said
            if "FAILED" in said:
                print(log.read_text())
    print(*(f"{name}: {result}" for name, result in results.items()), sep="\n")
    sys.exit(any("FAILED" in result for result in results.values()))


if __name__ == "__main__":
    main()
