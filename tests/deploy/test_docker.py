"""The image is made of the wheel, installs extras that exist, does not run as root, and has a health check that detects failure."""

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
    default = dict(argument.split("=") for argument in instructions("ARG"))["EXTRA"]
    named = set(re.findall(r"\b(tpu|gpu|cpu)\b", manifests.DOCKERFILE.read_text().partition("FROM")[0]))
    assert {default} | named == {"tpu", "gpu", "cpu"}
    assert {"tpu", "gpu", "cpu"} <= PYPROJECT["project"]["optional-dependencies"].keys()


def test_python_is_one_that_the_package_takes() -> None:
    stages = [stage.split(" AS ") for stage in instructions("FROM")]
    bases = {base for base, *_ in stages} - {name for _, *names in stages for name in names}
    assert bases == {"python:3.12-slim", "scratch"}
    assert PYPROJECT["project"]["requires-python"] == ">=3.12"


def test_what_is_copied_is_there_and_not_ignored() -> None:
    copied = [rest.split() for rest in instructions("COPY") if not rest.startswith("--from")]
    assert copied == [["README.md", "LICENSE", "/"], ["python", "/src"], ["python/constraints.txt", "/wheel/"]]
    for name in ("README.md", "LICENSE"):  # in the image these links lead from /src to /
        assert (manifests.REPOSITORY / "python" / name).readlink() == Path("..", name)
    assert (manifests.REPOSITORY / "python" / "constraints.txt").is_file()
    ignored = Path(f"{manifests.DOCKERFILE}.dockerignore").read_text().split("\n")
    assert [line for line in ignored if line and not line.startswith("#")][:4] == [
        *["*", "!README.md", "!LICENSE", "!python"]
    ]


def test_stages_hand_on_the_wheel_and_then_the_environment() -> None:
    stages = [stage.partition(" AS ")[2] for stage in instructions("FROM")]
    assert stages == ["uv", "build", "wheel", "install", ""]
    handed = [rest.split() for rest in instructions("COPY") if rest.startswith("--from")]
    assert handed == [
        ["--from=build", "/dist/*.whl", "/"],
        ["--from=wheel", "/*.whl", "/wheel/"],
        ["--from=install", "/opt/sgl_jax", "/opt/sgl_jax"],
    ]
    (build,) = [run for run in instructions("RUN") if "uv build" in run]
    assert "--wheel --out-dir /dist /src" in build


def lint(instruction: str, rest: str) -> list[str]:
    """Rules of hadolint that an instruction breaks."""
    rules = {
        "DL3006": instruction == "FROM" and not re.match(r"scratch|uv\b|\S+:\S+", rest),
        "DL3007": instruction == "FROM" and ":latest" in rest,
        "DL3004": instruction == "RUN" and re.search(r"\bsudo\b", rest),
        "DL3009": "apt-get install" in rest and "rm -rf /var/lib/apt/lists/*" not in rest,
        "DL3013": "pip install" in rest and "uv pip" not in rest and "==" not in rest,
        "DL3014": "apt-get install" in rest and " -y" not in rest,
        "DL3015": "apt-get install" in rest and "--no-install-recommends" not in rest,
        "DL3020": instruction == "ADD",
        "DL3025": instruction in ("CMD", "ENTRYPOINT") and not rest.startswith("["),
        "DL3042": "pip install" in rest and "--no-cache" not in rest,
        "DL3000": instruction == "WORKDIR" and not rest.startswith("/"),
        "DL4006": instruction == "RUN" and re.search(r"[^|]\|[^|]", rest),
    }
    return [rule for rule, broken in rules.items() if broken]


def test_it_follows_hadolints_rules() -> None:
    assert [(name, rest, lint(name, rest)) for name, rest in manifests.instructions() if lint(name, rest)] == []


@pytest.mark.parametrize(
    ("line", "rules"),
    [
        ("FROM python", ["DL3006"]),
        ("FROM python:latest", ["DL3007"]),
        ("RUN apt-get update && apt-get install g++", ["DL3009", "DL3014", "DL3015"]),
        ("RUN pip install uv", ["DL3013", "DL3042"]),
        ("ADD python /src", ["DL3020"]),
        ("ENTRYPOINT python -m sgl_jax", ["DL3025"]),
        ("RUN sudo ls | head", ["DL3004", "DL4006"]),
        ("WORKDIR src", ["DL3000"]),
    ],
)
def test_the_check_sees_broken_rules(line: str, rules: list[str]) -> None:
    name, _, rest = line.partition(" ")
    assert lint(name, rest) == rules


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
