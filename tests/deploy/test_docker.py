"""The Dockerfile installs extras that exist, runs as no root user, and has a health check that detects failure."""

from __future__ import annotations

import http.server
import json
import re
import subprocess
import sys
import threading
import tomllib
from pathlib import Path

import manifests
import pytest

from sgl_jax.settings.server_args import ServerArgs

PYPROJECT = tomllib.loads((manifests.REPOSITORY / "python" / "pyproject.toml").read_text())


def instructions(name: str) -> list[str]:
    return [rest for each, rest in manifests.instructions() if each == name]


def test_extras_exist() -> None:
    (argument,) = instructions("ARG")
    default = argument.removeprefix("EXTRA=")
    named = set(re.findall(r"\b(tpu|gpu|cpu)\b", manifests.DOCKERFILE.read_text().partition("FROM")[0]))
    assert {default} | named == {"tpu", "gpu", "cpu"}
    assert {"tpu", "gpu", "cpu"} <= PYPROJECT["project"]["optional-dependencies"].keys()


def test_python_is_one_that_the_package_takes() -> None:
    bases = {base.split()[0] for base in instructions("FROM")}
    assert bases == {"python:3.12-slim"}
    assert PYPROJECT["project"]["requires-python"] == ">=3.12"


def test_what_is_copied_is_there_and_not_ignored() -> None:
    copied = [rest.split() for rest in instructions("COPY") if not rest.startswith("--from")]
    assert copied == [["README.md", "LICENSE", "/"], ["python", "/src"]]
    for name in ("README.md", "LICENSE"):  # in the image these links lead from /src to /
        assert (manifests.REPOSITORY / "python" / name).readlink() == Path("..", name)
    assert (manifests.REPOSITORY / "python" / "constraints.txt").is_file()
    ignored = Path(f"{manifests.DOCKERFILE}.dockerignore").read_text().split("\n")
    assert [line for line in ignored if line and not line.startswith("#")][:4] == [
        *["*", "!README.md", "!LICENSE", "!python"]
    ]


def test_it_does_not_run_as_root() -> None:
    assert [int(user) > 0 for user in instructions("USER")] == [True]


def test_its_variables_are_flags() -> None:
    args = ServerArgs.from_cli(["--model-path", "m"], manifests.image_environ())
    assert (args.host, args.port, args.compilation_cache_dir) == ("0.0.0.0", 30000, "/cache/compiled")
    assert instructions("VOLUME") == ["/cache"]
    assert instructions("EXPOSE") == ["30000"]
    assert json.loads(instructions("ENTRYPOINT")[0]) == ["python", "-m", "sgl_jax.launch_server"]


class Health(http.server.BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1)])
def test_the_health_check_tells_sick_from_well(status: int, code: int) -> None:
    (check,) = instructions("HEALTHCHECK")
    command = json.loads(check.partition("CMD ")[2])
    handler = type("Handler", (Health,), {"status": status})
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            environ = {
                "PATH": str(Path(sys.executable).parent),
                "SGL_JAX_PORT": str(server.server_port),
            }
            assert subprocess.run(command, env=environ, capture_output=True, check=False).returncode == code
        finally:
            server.shutdown()
            thread.join()
