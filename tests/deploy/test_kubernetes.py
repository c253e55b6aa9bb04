"""Kubernetes manifests: names that refer to each other do, command lines are ours, and a pod drains before it ends."""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
from typing import Any

import kubernetes_validate
import pytest
import yaml
from command_lines import DEPLOY, known_variables, parsed

KUBERNETES = kubernetes_validate.latest_version()
FOLDER = DEPLOY / "kubernetes"
FILES = {file.name: list(yaml.safe_load_all(file.read_text())) for file in FOLDER.glob("*.yaml")}
KUSTOMIZATION = FILES["kustomization.yaml"][0]
OBJECTS = [item for name in KUSTOMIZATION["resources"] for item in FILES[name]]
SECRET = FILES["secret.example.yaml"][0]


def one(kind: str, name: str) -> dict[str, Any]:
    (found,) = [item for item in OBJECTS if item["kind"] == kind and item["metadata"]["name"] == name]
    assert isinstance(found, dict)
    return found


COORDINATOR, WORKERS = one("StatefulSet", "fusion-coordinator"), one("Deployment", "fusion-worker")
WORKLOADS = [pytest.param(COORDINATOR, id="coordinator"), pytest.param(WORKERS, id="workers")]


def container(workload: dict[str, Any]) -> dict[str, Any]:
    (found,) = workload["spec"]["template"]["spec"]["containers"]
    assert isinstance(found, dict)
    return found


def test_every_file_is_listed_and_every_object_is_whole() -> None:
    assert set(KUSTOMIZATION["resources"]) | {"kustomization.yaml", "secret.example.yaml"} == set(FILES)
    for item in OBJECTS:
        assert {"apiVersion", "kind", "metadata"} <= item.keys()
        assert re.fullmatch(r"[a-z0-9-]{1,63}", item["metadata"]["name"])
    keys = [(item["kind"], item["metadata"]["name"]) for item in OBJECTS]
    assert len(keys) == len(set(keys))
    # The secret of the example is never applied.
    assert "Secret" not in {kind for kind, _ in keys}


@pytest.mark.parametrize("item", [*OBJECTS, SECRET], ids=lambda item: f"{item['kind']}-{item['metadata']['name']}")
def test_every_object_fits_the_schema_of_kubernetes(item: dict[str, Any]) -> None:
    kubernetes_validate.validate(item, KUBERNETES, strict=True)


def test_the_schema_would_notice_a_mistake() -> None:
    wrong = copy.deepcopy(WORKERS)
    container(wrong)["livenessprobe"] = container(wrong).pop("livenessProbe")
    with pytest.raises(kubernetes_validate.ValidationError, match="livenessprobe"):
        kubernetes_validate.validate(wrong, KUBERNETES, strict=True)


@pytest.mark.parametrize("workload", WORKLOADS)
def test_names_that_refer_to_each_other_do(workload: dict[str, Any]) -> None:
    spec, pod = workload["spec"], workload["spec"]["template"]["spec"]
    labels = spec["template"]["metadata"]["labels"]
    assert spec["selector"]["matchLabels"].items() <= labels.items()
    volumes = {volume["name"] for volume in pod.get("volumes", [])}
    volumes |= {claim["metadata"]["name"] for claim in spec.get("volumeClaimTemplates", [])}
    assert {mount["name"] for mount in container(workload)["volumeMounts"]} == volumes
    ports = {port["name"] for port in container(workload)["ports"]}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        (action,) = [value for key, value in container(workload)[probe].items() if key in ("httpGet", "tcpSocket")]
        assert action["port"] in ports
    for variable in container(workload)["env"]:
        reference = variable.get("valueFrom", {}).get("secretKeyRef")
        if reference:
            assert reference["name"] == SECRET["metadata"]["name"]
            assert reference["key"] in SECRET["stringData"]
    if workload is COORDINATOR:
        service = one("Service", spec["serviceName"])
        assert service["spec"]["selector"].items() <= labels.items()
        assert {port["targetPort"] for port in service["spec"]["ports"]} == ports


def test_policies_and_budgets_select_pods_that_there_are() -> None:
    labels = [workload["spec"]["template"]["metadata"]["labels"] for workload in (COORDINATOR, WORKERS)]

    def selected(selector: dict[str, Any]) -> bool:
        return any(selector.get("matchLabels", {}).items() <= known.items() for known in labels)

    assert selected(one("PodDisruptionBudget", "fusion-worker")["spec"]["selector"])
    for policy in (item["spec"] for item in OBJECTS if item["kind"] == "NetworkPolicy"):
        assert selected(policy["podSelector"])
        for rule in policy["ingress"]:
            assert all(selected(source["podSelector"]) for source in rule["from"])


@pytest.mark.parametrize("workload", WORKLOADS)
def test_pods_hold_no_right_that_they_do_not_need(workload: dict[str, Any]) -> None:
    pod = workload["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert f"USER {pod['securityContext']['runAsUser']}:" in (DEPLOY / "Dockerfile").read_text()
    limits = container(workload)["securityContext"]
    assert (limits["allowPrivilegeEscalation"], limits["readOnlyRootFilesystem"]) == (False, True)
    assert limits["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize("workload", WORKLOADS)
def test_command_lines_and_settings_are_ours(workload: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {entry["name"]: str(entry.get("value", "secret")) for entry in container(workload)["env"]}
    assert {name for name in environment if name.startswith("FUSION_")} <= known_variables()
    settings = parsed(monkeypatch, container(workload)["args"], environment)
    if workload is WORKERS:
        service = one("Service", "fusion-coordinator")
        assert settings["join"] == f"http://{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
        assert environment["FUSION_ADVERTISE"] == f"$(POD_IP):{container(workload)['ports'][0]['containerPort']}"
        names = list(environment)
        assert names.index("POD_IP") < names.index("FUSION_ADVERTISE")  # Kubernetes expands only what came before.
    else:
        assert [settings["port"], settings["control_port"]] == [
            p["containerPort"] for p in container(workload)["ports"]
        ]


def test_a_worker_drains_before_kubernetes_loses_patience() -> None:
    hook = container(WORKERS)["lifecycle"]["preStop"]["exec"]["command"]
    assert hook[:2] == ["sh", "-c"]
    subprocess.run(["sh", "-n", "-c", hook[2]], check=True)
    assert hook[2].startswith("kill -TERM 1;")
    assert WORKERS["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > 90
    # The workers' token is the join token: a pod that is taken over can't command the pool.
    (token,) = [entry for entry in container(WORKERS)["env"] if entry["name"] == "FUSION_TOKEN"]
    assert token["valueFrom"]["secretKeyRef"]["key"] == "join"


def test_kustomize_builds_it() -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("needs kubectl")
    done = subprocess.run(["kubectl", "kustomize", FOLDER], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    built = list(yaml.safe_load_all(done.stdout))
    assert len(built) == len(OBJECTS)
    images = {container(item)["image"] for item in built if item["kind"] in ("Deployment", "StatefulSet")}
    from fusion import __version__

    assert images == {f"fusion:{__version__}"}
