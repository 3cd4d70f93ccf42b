"""Every command in deploy/ is one that the server takes, every path one that it answers, every metric one that it has."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import manifests
import pytest
import yaml
from manifests import the

from sgl_jax.engine.messages import Stats
from sgl_jax.observability.metrics import ApiState, RequestMetrics, exposition
from sgl_jax.server.app import create_routes
from sgl_jax.server.app_state import ServerState
from sgl_jax.settings.server_args import ServerArgs

type Command = tuple[list[str], dict[str, str]]  # arguments and environment


def routes() -> set[str]:
    return set(create_routes(ServerState(MagicMock(), ServerArgs(model_path="m"))).openapi()["paths"])


def metrics() -> set[str]:
    lines = exposition(RequestMetrics(), Stats(), {}, ApiState(responses={200: 1}))[0].decode().splitlines()
    return {re.split(r"[{ ]", line)[0] for line in lines if not line.startswith("#")}


def pairs(argv: list[str]) -> dict[str, str]:
    """Parse --flag value and --flag=value, where every flag has a value."""
    words = [word for each in argv for word in each.split("=", 1)]
    return dict(zip(words[::2], words[1::2], strict=True))


def check_hosts(commands: list[Command], address: str) -> None:
    for rank, (argv, environ) in enumerate(commands):
        flags = pairs(argv)
        assert (flags["--nnodes"], flags["--node-rank"], flags["--dist-init-addr"]) == ("4", str(rank), address)
        assert environ["SGL_JAX_DIST_TOKEN"] == "secret"
        args = ServerArgs.from_cli([f"{flag}={value}" for flag, value in flags.items()], environ)
        assert (args.host, args.port, args.tp_size * args.dp_size) == ("0.0.0.0", 30000, 16)


def test_replicas_start() -> None:
    args, environ = manifests.command(manifests.server_container(manifests.pod_templates()["replica"]), {})
    parsed = ServerArgs.from_cli(args, environ)
    assert (parsed.host, parsed.port, parsed.tp_size, parsed.nnodes) == ("0.0.0.0", 30000, 4, 1)
    assert parsed.compilation_cache_dir == "/cache/compiled"


def test_hosts_of_one_engine_start() -> None:
    commands = []
    for rank in range(4):
        container = manifests.server_container(manifests.pod_templates()["worker" if rank else "leader"])
        variables = {"LWS_LEADER_ADDRESS": "hosts-0.hosts.ns", "LWS_GROUP_SIZE": "4", "LWS_WORKER_INDEX": str(rank)}
        commands.append(manifests.command(container, variables))
    check_hosts(commands, "hosts-0.hosts.ns:10011")


def run_task(file: Path, folder: Path, **variables: str) -> Command:
    """Run the task's script with a python that records its arguments."""
    binaries = folder / ".venv" / "bin"
    binaries.mkdir(parents=True, exist_ok=True)
    (binaries / "activate").write_text(f'export PATH="{binaries}:$PATH"\n')
    python = binaries / "python"
    python.write_text('#!/bin/sh\nfor each in "$@"; do printf \'%s\\0\' "$each"; done\n')
    python.chmod(0o755)
    task = yaml.safe_load(file.read_text())
    secrets = dict.fromkeys(task["secrets"], "secret")
    environ = {"PATH": "/usr/bin:/bin", "HOME": "/home/user", **task["envs"], **secrets, **variables}
    done = subprocess.run(
        ["bash", "-c", task["run"]], cwd=folder, env=environ, capture_output=True, check=True, text=True
    )
    module, *argv = done.stdout.split("\0")[1:-1]
    assert module == "sgl_jax.launch_server"
    return argv, environ


@pytest.mark.parametrize("file", manifests.SKYPILOT, ids=lambda file: file.name)
def test_tasks_install_the_wheel_that_they_build(file: Path, tmp_path: Path) -> None:
    uv = tmp_path / "uv"
    uv.write_text('#!/bin/sh\necho "$@" >> calls\n[ "$1" = build ] && mkdir dist && touch dist/sgl_jax-1.whl || true\n')
    uv.chmod(0o755)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    environ = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    setup = yaml.safe_load(file.read_text())["setup"]
    subprocess.run(["bash", "-ec", setup], cwd=tmp_path, env=environ, check=True)
    _, build, install = (tmp_path / "calls").read_text().splitlines()
    assert build == "build --clear --wheel --out-dir dist python"
    wheel = f"sgl-jax[tpu] @ file://{tmp_path}/dist/sgl_jax-1.whl"
    assert install == f"pip install --constraints python/constraints.txt {wheel}"


@pytest.mark.parametrize("name", ["v6e_4", "v6e_4_spot"])
def test_a_task_on_one_host_starts(name: str, tmp_path: Path) -> None:
    parsed = ServerArgs.from_cli(*run_task(manifests.DEPLOY / "skypilot" / f"{name}.sky.yaml", tmp_path))
    assert (parsed.model_path, parsed.tp_size, parsed.nnodes, parsed.api_key) == ("Qwen/Qwen3-8B", 4, 1, "secret")
    assert (parsed.host, parsed.port) == ("0.0.0.0", 30000)
    assert parsed.compilation_cache_dir == "/home/user/.cache/sgl_jax"


@pytest.mark.parametrize("name", ["v6e_16", "v6e_16_spot"])
def test_a_task_on_four_hosts_starts(name: str, tmp_path: Path) -> None:
    file = manifests.DEPLOY / "skypilot" / f"{name}.sky.yaml"
    addresses = "\n".join(f"10.0.0.{number}" for number in range(2, 6))
    commands = [
        run_task(
            file, tmp_path, SKYPILOT_NUM_NODES="4", SKYPILOT_NODE_RANK=str(rank), SKYPILOT_NODE_IPS=f"{addresses}\n"
        )
        for rank in range(4)
    ]
    check_hosts(commands, "10.0.0.2:10011")


def http_gets(value: Any) -> list[str]:
    """Every path of a probe inside of `value`."""
    if isinstance(value, list):
        return [path for each in value for path in http_gets(each)]
    if not isinstance(value, dict):
        return []
    own = [value["httpGet"]["path"]] if "httpGet" in value else []
    return own + [path for each in value.values() for path in http_gets(each)]


def test_probes_ask_for_what_the_server_answers() -> None:
    paths = [path for each in manifests.kubernetes() for path in http_gets(each.object)]
    assert len(paths) == 6
    paths.append(the("HealthCheckPolicy").spec["default"]["config"]["httpHealthCheck"]["requestPath"])
    paths += [endpoint["path"] for endpoint in the("PodMonitor").spec["podMetricsEndpoints"]]
    tasks = [yaml.safe_load(file.read_text()) for file in manifests.SKYPILOT]
    probes = [task["service"]["readiness_probe"]["path"] for task in tasks if "service" in task]
    assert probes == ["/ready"]
    assert set(paths + probes) == {"/ready", "/health", "/metrics"}
    assert set(paths + probes) <= routes()


def test_routes_of_the_gateway_are_routes_of_the_server() -> None:
    ours = routes()
    for rule in the("HTTPRoute").spec["rules"]:
        for match in rule["matches"]:
            kind, path = match["path"]["type"], match["path"]["value"]
            found = path in ours if kind == "Exact" else any(each.startswith(f"{path}/") for each in ours)
            assert found, path


def test_metrics_that_are_named_exist() -> None:
    ours = metrics()
    files = [path for path in manifests.DEPLOY.rglob("*") if path.suffix in (".yaml", ".json")]
    named = {path.name: set(re.findall(r"\bsgl_jax_\w+", path.read_text())) for path in files}
    assert {name: names - ours for name, names in named.items() if names - ours} == {}
    assert len(named["endpoint_picker_config.yaml"]) == 3
    assert len(named["monitoring.yaml"]) == 1


def test_the_dashboard_shows_every_kind_of_metric() -> None:
    dashboard = json.loads((manifests.DEPLOY / "grafana" / "sgl_jax.json").read_text())
    panels = dashboard["panels"]
    assert [panel["id"] for panel in panels] == list(range(1, len(panels) + 1))
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len(places) == len(panels)
    shown = {name for panel in panels for each in panel["targets"] for name in re.findall(r"sgl_jax_\w+", each["expr"])}
    unshown = metrics() - shown
    assert {re.sub(r"_(bucket|count|sum)$", "", name) for name in unshown} == {
        "sgl_jax_e2e_request_latency_seconds",
        "sgl_jax_build_info",
        "sgl_jax_generation_throughput",
        "sgl_jax_inter_token_latency_seconds",  # its count and sum
        "sgl_jax_programs_compiling",
        "sgl_jax_time_to_first_token_seconds",
    }
