"""Kubernetes beyond one host: fields that the kinds have, names that the server has.

Custom kinds are held to the fields of their references, core kinds to Kubernetes' own schemas where
kubernetes-validate is installed (`bash run_tests.sh --deploy`).
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from autotp_serving.config import ServingConfig

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy/kubernetes"

# By kind: its version, its fields, those it must have; `[]` is each of a list, `*` any name.
# LeaderWorkerSet: lws.sigs.k8s.io/docs/reference/leaderworkerset.v1
# ScaledObject: keda.sh/docs/latest/reference/scaledobject-spec, .../docs/latest/scalers/prometheus
# InferencePool: gateway-api-inference-extension.sigs.k8s.io/reference/spec
# HTTPRoute: gateway-api.sigs.k8s.io/reference/spec
KINDS: dict[str, tuple[str, str, str]] = {
    "LeaderWorkerSet": (
        "leaderworkerset.x-k8s.io/v1",
        """replicas startupPolicy networkConfig.subdomainPolicy rolloutStrategy.type
        rolloutStrategy.rollingUpdateConfiguration.maxUnavailable
        rolloutStrategy.rollingUpdateConfiguration.maxSurge
        rolloutStrategy.rollingUpdateConfiguration.partition
        leaderWorkerTemplate.size leaderWorkerTemplate.restartPolicy
        leaderWorkerTemplate.leaderTemplate leaderWorkerTemplate.workerTemplate
        leaderWorkerTemplate.subGroupPolicy.subGroupSize""",
        "leaderWorkerTemplate.workerTemplate rolloutStrategy.type",
    ),
    "ScaledObject": (
        "keda.sh/v1alpha1",
        """scaleTargetRef.apiVersion scaleTargetRef.kind scaleTargetRef.name
        scaleTargetRef.envSourceContainerName pollingInterval cooldownPeriod initialCooldownPeriod
        idleReplicaCount minReplicaCount maxReplicaCount fallback.failureThreshold
        fallback.replicas fallback.behavior advanced.restoreToOriginalReplicaCount
        advanced.horizontalPodAutoscalerConfig.name advanced.horizontalPodAutoscalerConfig.behavior
        triggers[].type triggers[].name triggers[].metricType triggers[].useCachedMetrics
        triggers[].authenticationRef.name triggers[].metadata.serverAddress
        triggers[].metadata.query triggers[].metadata.threshold
        triggers[].metadata.activationThreshold triggers[].metadata.ignoreNullValues""",
        """scaleTargetRef.name triggers[].type triggers[].metadata.serverAddress
        triggers[].metadata.query triggers[].metadata.threshold fallback.failureThreshold
        fallback.replicas""",
    ),
    "InferencePool": (
        "inference.networking.k8s.io/v1",
        """selector.matchLabels.* targetPorts[].number appProtocol endpointPickerRef.group
        endpointPickerRef.kind endpointPickerRef.name endpointPickerRef.port.number
        endpointPickerRef.failureMode""",
        """selector.matchLabels.* targetPorts[].number endpointPickerRef.name
        endpointPickerRef.port.number""",
    ),
    "HTTPRoute": (
        "gateway.networking.k8s.io/v1",
        """hostnames parentRefs[].group parentRefs[].kind parentRefs[].name parentRefs[].namespace
        parentRefs[].port parentRefs[].sectionName rules[].matches[].path.type
        rules[].matches[].path.value rules[].backendRefs[].group rules[].backendRefs[].kind
        rules[].backendRefs[].name rules[].backendRefs[].namespace rules[].backendRefs[].port
        rules[].backendRefs[].weight rules[].timeouts.request rules[].timeouts.backendRequest""",
        "parentRefs[].name rules[].backendRefs[].name",
    ),
}
OPAQUE = ("leaderTemplate", "workerTemplate", "behavior")  # core kinds' own
CHOICES = {
    "leaderWorkerTemplate.restartPolicy": {
        "Default", "RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None",
    },
    "startupPolicy": {"LeaderCreated", "LeaderReady"},
    "rolloutStrategy.type": {"RollingUpdate"},
    "triggers[].metricType": {"AverageValue", "Value"},
    "endpointPickerRef.failureMode": {"FailOpen", "FailClose"},
    "rules[].matches[].path.type": {"Exact", "PathPrefix", "RegularExpression"},
}  # fmt: skip


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / name).read_text())


FILES = {
    "LeaderWorkerSet": "leader-worker-set/leader-worker-set.yaml",
    "ScaledObject": "autoscaling/scaled-object.yaml",
    "InferencePool": "gateway/inference-pool.yaml",
    "HTTPRoute": "gateway/http-route.yaml",
}


def list_fields(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves and their paths."""
    if path.rpartition(".")[2] in OPAQUE or not isinstance(value, dict | list):
        yield path, value
    elif isinstance(value, list):
        for item in value:
            yield from list_fields(item, f"{path}[]")
    else:
        for name, item in value.items():
            known = "*" if path.endswith("matchLabels") else name
            yield from list_fields(item, f"{path}.{known}".lstrip("."))


@pytest.mark.parametrize("kind", KINDS)
def test_custom_kinds_have_the_fields_of_their_references(kind: str) -> None:
    version, fields, needed = KINDS[kind]
    document = read(FILES[kind])
    assert (document["apiVersion"], document["kind"]) == (version, kind)
    found = list(list_fields(document["spec"]))
    assert {path for path, _ in found} <= set(fields.split())
    assert set(needed.split()) <= {path for path, _ in found}
    for path, value in found:
        assert path not in CHOICES or value in CHOICES[path], path
        if ".metadata." in path:
            assert isinstance(value, str), f"{path} must be text"


def validate(document: dict[str, Any], folder: Path) -> None:
    if shutil.which("kubernetes-validate") is None:
        pytest.skip("kubernetes-validate is not installed")
    path = folder / "document.yaml"
    path.write_text(yaml.safe_dump(document))
    command = ["kubernetes-validate", "--strict", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("template", ["leaderTemplate", "workerTemplate"])
def test_pods_of_a_group_obey_the_schema(template: str, tmp_path: Path) -> None:
    pod = read(FILES["LeaderWorkerSet"])["spec"]["leaderWorkerTemplate"][template]
    metadata = pod["metadata"] | {"name": "pod"}
    validate({"apiVersion": "v1", "kind": "Pod"} | pod | {"metadata": metadata}, tmp_path)


def test_the_groups_service_obeys_the_schema(tmp_path: Path) -> None:
    validate(read("leader-worker-set/service.yaml"), tmp_path)


def test_the_autoscaler_that_is_made_obeys_the_schema(tmp_path: Path) -> None:
    spec = read(FILES["ScaledObject"])["spec"]
    behavior = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    metrics = [
        {
            "type": "External",
            "external": {
                "metric": {"name": f"s{index}-prometheus"},
                "target": {
                    "type": trigger["metricType"],
                    trigger["metricType"][0].lower() + trigger["metricType"][1:]: trigger[
                        "metadata"
                    ]["threshold"],
                },
            },
        }
        for index, trigger in enumerate(spec["triggers"])
    ]
    validate(
        {
            "apiVersion": "autoscaling/v2",
            "kind": "HorizontalPodAutoscaler",
            "metadata": {"name": "keda-hpa-autotp-serving"},
            "spec": {
                "scaleTargetRef": spec["scaleTargetRef"],
                "minReplicas": spec["minReplicaCount"],
                "maxReplicas": spec["maxReplicaCount"],
                "behavior": behavior,
                "metrics": metrics,
            },
        },
        tmp_path,
    )


def test_a_group_over_hosts_fits_the_servers_habits() -> None:
    spec = read(FILES["LeaderWorkerSet"])["spec"]["leaderWorkerTemplate"]
    leader, worker = spec["leaderTemplate"], spec["workerTemplate"]
    of_leader, of_worker = (one["spec"]["containers"][0] for one in (leader, worker))
    assert of_leader["command"] == of_worker["command"]
    words = " ".join(of_leader["command"])
    given = {item["name"]: item.get("value") for item in of_leader["env"]}
    used = set(re.findall(r"\$(\w+)", words))
    of_lws = {"LWS_GROUP_SIZE", "LWS_WORKER_INDEX", "LWS_LEADER_ADDRESS"}
    assert used == of_lws | {
        "RANKS_PER_HOST", "MODEL", "SERVED_MODEL_NAME", "LOW_BIT", "MAX_MODEL_LEN",
    }  # fmt: skip
    assert used - of_lws <= set(given)
    assert of_leader["resources"]["limits"]["nvidia.com/gpu"] == given["RANKS_PER_HOST"]
    sleep = int(of_leader["lifecycle"]["preStop"]["exec"]["command"][1])
    drain = ServingConfig(model_path="x").drain_seconds
    assert leader["spec"]["terminationGracePeriodSeconds"] > sleep + drain
    assert not {"readinessProbe", "livenessProbe", "ports"} & set(of_worker)
    service = read("leader-worker-set/service.yaml")["spec"]
    assert service["selector"].items() <= leader["metadata"]["labels"].items()
    assert not service["selector"].items() <= worker["metadata"]["labels"].items()
    claim = leader["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"]
    assert claim == read("base/models.yaml")["metadata"]["name"]


def test_metrics_are_those_of_the_server() -> None:
    """docs/metrics.md is held to the server by a test of its own."""
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \|", (ROOT / "docs/metrics.md").read_text(), re.M)
    kinds = dict(rows)
    queries = " ".join(
        one["metadata"]["query"] for one in read(FILES["ScaledObject"])["spec"]["triggers"]
    )
    values = (FOLDER / "gateway/router-values.yaml").read_text()
    for name in re.findall(r"autotp:(\w+)", queries + values):
        base, _, suffix = name.rpartition("_")
        if suffix in ("bucket", "count"):
            assert kinds[base] == "histogram", name
        else:
            assert kinds[name] == "gauge", name
    for name in ("num_requests_waiting", "kv_cache_usage_perc", "time_to_first_token_seconds"):
        assert f"autotp:{name}" in queries


def test_the_gateway_leads_to_the_pods() -> None:
    pool = read(FILES["InferencePool"])
    service = read("base/service.yaml")["spec"]
    assert [port["number"] for port in pool["spec"]["targetPorts"]] == [service["ports"][0]["port"]]
    values = read("gateway/router-values.yaml")["router"]
    labels = pool["spec"]["selector"]["matchLabels"]
    assert values["modelServers"]["matchLabels"] == labels
    base = read("base/kustomization.yaml")["labels"][0]
    assert base["includeSelectors"] and base["pairs"] == labels
    name = pool["metadata"]["name"]
    assert pool["spec"]["endpointPickerRef"]["name"] == f"{name}-epp"
    backend = read(FILES["HTTPRoute"])["spec"]["rules"][0]["backendRefs"][0]
    assert (backend["kind"], backend["name"]) == ("InferencePool", name)
    config = yaml.safe_load(
        values["epp"]["pluginsCustomConfig"][values["epp"]["pluginsConfigFile"]]
    )
    plugins = {plugin["type"] for plugin in config["plugins"]}
    used = {one["pluginRef"] for one in config["schedulingProfiles"][0]["plugins"]}
    assert used <= plugins
