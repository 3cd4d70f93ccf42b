"""The package as a user gets it: the source archive, the wheel made of it, and that wheel, installed and serving.

`make test-plain` runs this file in an environment that holds the wheel and nothing of the repository.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "python" / "sgl_jax"
DIST = Path(sys.prefix) / "dist"
START_S = 300  # on a busy machine
# Few small programs, so that the server starts soon.
FLAGS = ["--max-running-requests", "2", "--chunked-prefill-size", "16", "--max-total-tokens", "512"]


pytestmark = pytest.mark.timeout(START_S + 60)


def the(suffix: str) -> Path:
    (found,) = DIST.glob(f"*{suffix}")
    return found


def source_files() -> set[str]:
    """Files of the package in the repository, from the folder of the package on."""
    files = (path.relative_to(PACKAGE.parent) for path in PACKAGE.rglob("*") if path.is_file())
    return {str(path) for path in files if "__pycache__" not in path.parts and path.suffix != ".so"}


def test_the_wheel_has_every_file_of_the_package_but_sources_in_c() -> None:
    with zipfile.ZipFile(the(".whl")) as wheel:
        names = {name for name in wheel.namelist() if name.startswith("sgl_jax/")}
    expected = {name for name in source_files() if PurePosixPath(name).suffix not in (".cc", ".h")}
    assert names == expected
    assert {"sgl_jax/server/web/chat.html", "sgl_jax/models/configs/Qwen3-8B.json", "sgl_jax/py.typed"} <= names


def test_the_source_archive_has_all_that_a_build_and_the_tests_need() -> None:
    with tarfile.open(the(".tar.gz")) as archive:
        members = {member.name.partition("/")[2]: member for member in archive.getmembers()}
    assert source_files() <= members.keys()
    assert {"setup.py", "pyproject.toml", "constraints.txt", "tests/conftest.py"} <= members.keys()
    assert members["README.md"].isfile()  # a link in the repository, whose target is not in the archive
    assert members["LICENSE"].isfile()


def test_the_wheel_carries_its_readme_and_its_licence() -> None:
    about = metadata.metadata("sgl-jax")
    assert about["License-Expression"] == "Apache-2.0"
    assert about["Description-Content-Type"] == "text/markdown"
    assert about.get_payload().strip() == (REPOSITORY / "README.md").read_text(encoding="utf-8").strip()
    (licence,) = (file for file in metadata.files("sgl-jax") or () if file.name == "LICENSE")
    assert licence.read_text() == (REPOSITORY / "LICENSE").read_text(encoding="utf-8")


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.strip()


def test_nothing_of_the_repository_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    place = run("-c", "import sgl_jax; print(sgl_jax.__file__)")
    assert Path(place).is_relative_to(sys.prefix)
    assert run("-m", "sgl_jax", "--version") == f"sgl_jax {metadata.version('sgl-jax')}"


@contextlib.contextmanager
def served(model: Path, folder: Path) -> Iterator[str]:
    """Serve a model from an empty folder, and end the server."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    command = [sys.executable, "-m", "sgl_jax", "--model-path", str(model), "--port", str(port), *FLAGS]
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"XDG_CACHE_HOME": str(folder)}
    with (folder / "log").open("w") as log, subprocess.Popen(command, cwd=folder, env=environ, stderr=log) as process:
        try:
            address = f"http://127.0.0.1:{port}"
            wait_until_ready(address, process, folder / "log")
            yield address
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def url(stories260k: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(stories260k, tmp_path_factory.mktemp("served")) as address:
        yield address


def wait_until_ready(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    give_up = time.monotonic() + START_S
    while time.monotonic() < give_up:
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(f"{address}/ready"):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
    pytest.fail(f"not ready after {START_S} s:\n{log.read_text()}")


def ask(address: str, path: str, body: dict[str, object]) -> dict[str, Any]:
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(address + path, json.dumps(body).encode(), headers)) as answer:
        return json.load(answer)


def test_it_answers(url: str) -> None:
    with urllib.request.urlopen(f"{url}/health") as answer:
        assert answer.status == 200
    answered = ask(url, "/v1/completions", {"prompt": "Once upon a time", "max_tokens": 4, "temperature": 0})
    assert answered["choices"][0]["text"] == ", there was a"


def test_the_default_model_answers_in_a_chat(smollm2: Path, tmp_path: Path) -> None:
    with served(smollm2, tmp_path) as address:
        body = {
            "messages": [{"role": "user", "content": "Name the capital of France in a sentence."}],
            "temperature": 0,
        }
        message = ask(address, "/v1/chat/completions", body | {"max_tokens": 12})["choices"][0]["message"]
    assert "Paris" in message["content"]


def test_it_shows_the_page_with_its_files(url: str) -> None:
    with urllib.request.urlopen(f"{url}/") as answer:
        page = answer.read().decode()
    assert 'src="web/chat.js"' in page
    with urllib.request.urlopen(f"{url}/web/vendor/preact-htm.js") as answer:
        assert answer.status == 200
