"""Readers of deploy/: Kubernetes objects, the containers in them, SkyPilot tasks, the Dockerfile."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
DEPLOY = REPOSITORY / "deploy"
DOCKERFILE = DEPLOY / "docker" / "Dockerfile"
SKYPILOT = sorted((DEPLOY / "skypilot").glob("*.yaml"))
_SCHEMAS = sorted((Path(__file__).parent / "schemas").glob("*.json"))
_VARIABLE = re.compile(r"\$\((\w+)\)")


class Manifest(NamedTuple):
    file: str
    object: dict[str, Any]

    @property
    def kind(self) -> str:
        return self.object["kind"]

    @property
    def spec(self) -> dict[str, Any]:
        return self.object["spec"]

    def __str__(self) -> str:
        return f"{self.file}:{self.kind}"


@functools.cache
def kubernetes() -> list[Manifest]:
    """Read all objects, once; the caller must not change them."""
    files = sorted((DEPLOY / "gke").rglob("*.yaml"))
    return [
        Manifest(str(file.relative_to(DEPLOY)), each) for file in files for each in yaml.safe_load_all(file.read_text())
    ]


def the(kind: str, name: str | None = None) -> Manifest:
    """The only object of this kind, and of this name if one is given."""
    (found,) = [each for each in kubernetes() if each.kind == kind and name in (None, each.object["metadata"]["name"])]
    return found


def schemas() -> dict[str, dict[str, Any]]:
    """A whole JSON schema by kind."""
    read = [json.loads(path.read_text()) for path in _SCHEMAS]
    shared = {name: schema for each in read for name, schema in each.get("$defs", {}).items()}
    return {kind: {**schema, "$defs": shared} for each in read for kind, schema in each["kinds"].items()}


def pod_templates() -> dict[str, dict[str, Any]]:
    """Specs of the pods that run the server, by name of their role."""
    lws = the("LeaderWorkerSet").spec["leaderWorkerTemplate"]
    return {
        "replica": the("Deployment", "sgl-jax").spec["template"],
        "leader": lws["leaderTemplate"],
        "worker": lws["workerTemplate"],
    }


def server_container(template: Mapping[str, Any]) -> dict[str, Any]:
    (container,) = template["spec"]["containers"]
    return container


def command(container: Mapping[str, Any], variables: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """Return arguments and environment as the kubelet makes them; every secret is "secret"."""
    environ = image_environ() | dict(variables)
    environ |= {each["name"]: each.get("value", "secret") for each in container.get("env", ())}
    return [_VARIABLE.sub(lambda match: environ[match[1]], each) for each in container["args"]], environ


def instructions() -> Iterator[tuple[str, str]]:
    """Instructions of the Dockerfile, with continued lines joined."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    for line in text.splitlines():
        if line.strip():
            name, _, rest = line.partition(" ")
            yield name, " ".join(rest.split())


def image_environ() -> dict[str, str]:
    return dict(pair.split("=", 1) for name, rest in instructions() if name == "ENV" for pair in rest.split())
