"""Files in deploy/ fit the schemas of Kubernetes, its custom resources and SkyPilot, and each other."""

from __future__ import annotations

import copy
import math
from typing import Any

import jsonschema_rs
import manifests
import pytest
import yaml
from manifests import Manifest, the

from sgl_jax.server.api_process import _LAST_WORDS_S
from sgl_jax.settings.server_args import ServerArgs

SCHEMAS = manifests.schemas()
# Their schemas are not here: GKE's come with its clusters, and the other two are files for programs, not objects.
UNCHECKED = {"GCPBackendPolicy", "HealthCheckPolicy", "Kustomization", "EndpointPickerConfig"}
CHECKED = [each for each in manifests.kubernetes() if each.kind not in UNCHECKED]
CLOSE_S = 10 + _LAST_WORDS_S  # at most, from the end of the requests' time to the end of the server


def errors(kind: str, value: Any) -> list[str]:
    return [str(error) for error in jsonschema_rs.validator_for(SCHEMAS[kind]).iter_errors(value)]


@pytest.mark.parametrize("manifest", CHECKED, ids=str)
def test_objects_fit_their_schemas(manifest: Manifest) -> None:
    assert errors(manifest.kind, manifest.object) == []


@pytest.mark.parametrize("manifest", CHECKED, ids=str)
def test_schemas_refuse_what_is_wrong(manifest: Manifest) -> None:
    wrong = copy.deepcopy(manifest.object)
    wrong["nonsense"] = 1
    assert errors(manifest.kind, wrong)
    wrong = copy.deepcopy(manifest.object)
    wrong["metadata"] = "sgl-jax"
    assert errors(manifest.kind, wrong)
    if "spec" in manifest.object:
        wrong = copy.deepcopy(manifest.object)
        wrong["spec"]["nonsense"] = 1
        assert errors(manifest.kind, wrong)


def test_schemas_reach_into_pods() -> None:
    for path, value in {("livenessProbe", "httpGet", "port"): None, ("resources", "limits"): 4}.items():
        wrong = copy.deepcopy(the("LeaderWorkerSet").object)
        at = manifests.server_container(wrong["spec"]["leaderWorkerTemplate"]["leaderTemplate"])
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value
        assert errors("LeaderWorkerSet", wrong)


@pytest.mark.parametrize("file", manifests.SKYPILOT, ids=lambda file: file.name)
def test_skypilot_takes_the_tasks(file: Any) -> None:
    task = yaml.safe_load(file.read_text())
    assert errors("Task", task) == []
    assert errors("Task", task | {"nonsense": 1})
    assert errors("Task", task | {"resources": {"use_spot": "maybe"}})


@pytest.mark.parametrize("name", ["v6e_4", "v6e_16"])
def test_spot_tasks_run_what_the_plain_ones_run(name: str) -> None:
    plain, spot = (
        yaml.safe_load((manifests.DEPLOY / "skypilot" / f"{name}{suffix}.sky.yaml").read_text())
        for suffix in ("", "_spot")
    )
    assert spot["resources"].pop("use_spot") is True
    assert spot["resources"].pop("infra") == "gcp"
    spot["resources"].pop("job_recovery", None)
    spot.pop("service", None)
    assert spot == plain


def test_kustomizations_name_every_file() -> None:
    folders = [path for path in (manifests.DEPLOY / "gke").iterdir() if path.is_dir()]
    assert len(folders) == 3
    for folder in folders:
        kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
        named = kustomization["resources"] + [
            file for generator in kustomization.get("configMapGenerator", ()) for file in generator["files"]
        ]
        assert sorted([*named, "kustomization.yaml"]) == sorted(path.name for path in folder.iterdir())


def test_the_gateway_finds_the_servers() -> None:
    pool, route, servers = the("InferencePool"), the("HTTPRoute"), the("Deployment", "sgl-jax")
    container = manifests.server_container(servers.spec["template"])
    labels = servers.spec["template"]["metadata"]["labels"]
    assert pool.spec["selector"]["matchLabels"].items() <= labels.items()
    assert [port["number"] for port in pool.spec["targetPorts"]] == [
        port["containerPort"] for port in container["ports"] if port["name"] == "http"
    ]
    name = pool.object["metadata"]["name"]
    for reference in (
        *route.spec["rules"][0]["backendRefs"],
        the("HealthCheckPolicy").spec["targetRef"],
        the("GCPBackendPolicy").spec["targetRef"],
    ):
        assert (reference["kind"], reference["name"]) == ("InferencePool", name)
    assert route.spec["parentRefs"] == [{"name": the("Gateway").object["metadata"]["name"]}]
    assert the("HealthCheckPolicy").spec["default"]["config"]["httpHealthCheck"]["port"] == 30000


def test_the_gateway_finds_the_picker_and_the_picker_the_pool() -> None:
    pool, service = the("InferencePool"), the("Service", "endpoint-picker")
    picker = the("Deployment", "endpoint-picker").spec["template"]
    reference = pool.spec["endpointPickerRef"]
    assert reference["name"] == service.object["metadata"]["name"]
    assert reference["port"]["number"] in [port["port"] for port in service.spec["ports"]]
    assert service.spec["selector"].items() <= picker["metadata"]["labels"].items()
    (container,) = picker["spec"]["containers"]
    assert f"--pool-name={pool.object['metadata']['name']}" in container["args"]
    ports = {port["containerPort"] for port in container["ports"]}
    assert {container[probe]["grpc"]["port"] for probe in ("readinessProbe", "livenessProbe")} <= ports
    (config,) = [arg.rpartition("/")[2] for arg in container["args"] if arg.startswith("--config-file=")]
    assert (manifests.DEPLOY / "gke" / "replicas" / config).is_file()


def test_the_picker_reads_our_metrics_and_counts_our_pages() -> None:
    (config,) = [each.object for each in manifests.kubernetes() if each.kind == "EndpointPickerConfig"]
    parameters = {plugin["type"]: plugin.get("parameters", {}) for plugin in config["plugins"]}
    template = manifests.pod_templates()["replica"]
    extractor = parameters["core-metrics-extractor"]
    (engine,) = extractor["engineConfigs"]
    assert engine["name"] == extractor["defaultEngine"] == template["metadata"]["labels"]["llm-d.ai/engine-type"]
    assert {"queuedRequestsSpec", "runningRequestsSpec", "kvUsageSpec"} < engine.keys()
    args, environ = manifests.command(manifests.server_container(template), {})
    assert parameters["approx-prefix-cache-producer"]["blockSizeTokens"] == ServerArgs.from_cli(args, environ).page_size
    (profile,) = config["schedulingProfiles"]
    assert {plugin["pluginRef"] for plugin in profile["plugins"]} <= parameters.keys()


def test_monitoring_and_services_select_pods_that_are_there() -> None:
    templates = manifests.pod_templates()
    monitor, scaler, service = the("PodMonitor"), the("HorizontalPodAutoscaler"), the("Service", "sgl-jax")
    assert monitor.spec["selector"]["matchLabels"].items() <= templates["replica"]["metadata"]["labels"].items()
    ports = [port["name"] for port in manifests.server_container(templates["replica"])["ports"]]
    assert [endpoint["port"] for endpoint in monitor.spec["podMetricsEndpoints"]] == ports
    assert scaler.spec["scaleTargetRef"]["name"] == the("Deployment", "sgl-jax").object["metadata"]["name"]
    assert service.spec["selector"].items() <= templates["leader"]["metadata"]["labels"].items()
    assert not service.spec["selector"].items() <= templates["worker"]["metadata"]["labels"].items()
    policy = the("NetworkPolicy").spec["podSelector"]["matchLabels"].items()
    assert (
        policy <= templates["leader"]["metadata"]["labels"].items() & templates["worker"]["metadata"]["labels"].items()
    )


@pytest.mark.parametrize("name", ["replica", "leader", "worker"])
def test_chips_of_the_topology_are_those_of_the_flags(name: str) -> None:
    template = manifests.pod_templates()[name]
    container = manifests.server_container(template)
    hosts = 1 if name == "replica" else the("LeaderWorkerSet").spec["leaderWorkerTemplate"]["size"]
    topology = template["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = math.prod(map(int, topology.split("x")))
    flags = dict(arg.split("=", 1) for arg in container["args"])
    assert chips == int(container["resources"]["limits"]["google.com/tpu"]) * hosts
    assert chips == int(flags["--tp-size"]) * int(flags.get("--dp-size", 1))
    assert container["resources"]["requests"]["google.com/tpu"] == container["resources"]["limits"]["google.com/tpu"]


def test_hosts_of_an_engine_run_the_same_command() -> None:
    leader, worker = (manifests.pod_templates()[name] for name in ("leader", "worker"))
    assert leader["spec"]["nodeSelector"] == worker["spec"]["nodeSelector"]
    for key in ("image", "args", "env", "resources", "volumeMounts"):
        assert manifests.server_container(leader)[key] == manifests.server_container(worker)[key]
    # Workers do not listen; and the leader is ready only with them, so they must not wait for it.
    assert not {"startupProbe", "readinessProbe", "livenessProbe"} & manifests.server_container(worker).keys()
    assert the("LeaderWorkerSet").spec["startupPolicy"] == "LeaderCreated"


def drain_s(name: str) -> int:
    """Longest time in seconds from the order to stop the pod to the end of the server."""
    container = manifests.server_container(manifests.pod_templates()[name])
    flags = dict(arg.split("=", 1) for arg in container["args"])
    return container["lifecycle"]["preStop"]["sleep"]["seconds"] + int(flags["--shutdown-timeout-s"]) + CLOSE_S


def test_requests_can_finish_before_a_pod_is_killed() -> None:
    templates = manifests.pod_templates()
    for name in ("replica", "leader"):
        assert templates[name]["spec"]["terminationGracePeriodSeconds"] >= drain_s(name)
    worker_sleep = manifests.server_container(templates["worker"])["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert drain_s("leader") <= worker_sleep < templates["worker"]["spec"]["terminationGracePeriodSeconds"]
    draining = the("GCPBackendPolicy").spec["default"]["connectionDraining"]["drainingTimeoutSec"]
    assert draining >= drain_s("replica") - 10


def test_no_secret_and_no_image_address_is_written_down() -> None:
    assert [each for each in manifests.kubernetes() if each.kind == "Secret"] == []
    for each in manifests.kubernetes():
        if each.kind == "Kustomization":
            assert all("/" not in image["newName"] for image in each.object.get("images", ()))
    for file in manifests.SKYPILOT:
        assert set(yaml.safe_load(file.read_text())["secrets"].values()) == {None}
