"""Promises of the manifests: every overlay builds, keeps to the schemas, and fits the server."""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from service.routes import router
from service.settings import Settings, read_keys
from tests.deploy.custom import SCHEMAS
from tests.deploy.dockerfile import STAGES
from tests.deploy.promql import exported, names_in

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
OVERLAYS = sorted(path.parent.name for path in KUBERNETES.glob("overlays/*/kustomization.yaml"))
SCALED = [name for name in OVERLAYS if name.startswith("autoscale")]
RELEASES = ("1.32", "1.37")

WITH_KUBECTL = pytest.mark.skipif(
    shutil.which("kubectl") is None, reason="kubectl is not installed, which has kustomize"
)
pytestmark = WITH_KUBECTL

Manifest = dict[str, Any]


@functools.cache
def built(overlay: str, folder: Path = KUBERNETES) -> tuple[Manifest, ...]:
    done = subprocess.run(
        ["kubectl", "kustomize", folder / "overlays" / overlay],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr  # kustomize warns of what it will drop
    return tuple(yaml.safe_load_all(done.stdout))


def the(overlay: str, kind: str) -> Manifest:
    (found,) = [each for each in built(overlay) if each["kind"] == kind]
    return found


def pod_of(overlay: str) -> Manifest:
    return dict(the(overlay, "Deployment")["spec"]["template"])


def server_of(overlay: str) -> Manifest:
    (server,) = pod_of(overlay)["spec"]["containers"]
    return dict(server)


def test_these_are_the_overlays():
    assert OVERLAYS == ["autoscale", "autoscale-keda", "cpu", "gpu"]


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_keeps_to_the_schemas_of_kubernetes(overlay, release):
    for manifest in built(overlay):
        if manifest["kind"] not in SCHEMAS:
            kubernetes_validate.validate(manifest, release, strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_selector_selects_the_pods_and_no_others(overlay):
    labels = pod_of(overlay)["metadata"]["labels"]
    selectors = [
        the(overlay, "Deployment")["spec"]["selector"]["matchLabels"],
        the(overlay, "Service")["spec"]["selector"],
        the(overlay, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        the(overlay, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
    ]
    for selector in selectors:
        assert selector == {"app.kubernetes.io/name": "elastiformer"}
        assert selector.items() <= labels.items()


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_pod_has_no_rights_and_writes_only_where_it_may(overlay):
    pod, server = pod_of(overlay)["spec"], server_of(overlay)
    (user,) = STAGES["cpu"].texts("USER")
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert f"{pod['securityContext']['runAsUser']}:{pod['securityContext']['fsGroup']}" == user
    assert pod["automountServiceAccountToken"] is False
    context = server["securityContext"]
    assert context["readOnlyRootFilesystem"] and not context["allowPrivilegeEscalation"]
    assert context["capabilities"] == {"drop": ["ALL"]}
    writable = {each["mountPath"] for each in server["volumeMounts"] if not each.get("readOnly")}
    assert writable == {"/cache", "/tmp"}
    assert {each["name"] for each in server["volumeMounts"]} == {
        each["name"] for each in pod["volumes"]
    }


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_probes_ask_routes_that_exist_on_the_port_of_the_server(overlay):
    server = server_of(overlay)
    routes = {route.path for route in router.routes}
    asked = {probe: server[probe]["httpGet"] for probe in ("startupProbe", "readinessProbe")}
    assert all(get["path"] == "/ready" for get in asked.values())
    assert server["livenessProbe"]["httpGet"]["path"] == "/health"
    assert {"/ready", "/health", "/metrics"} <= routes
    (port,) = server["ports"]
    assert port == {"name": "http", "containerPort": Settings.model_fields["port"].default}
    (monitored,) = (
        the(overlay, "ServiceMonitor")["spec"]["endpoints"] if overlay in SCALED else [None]
    )
    if monitored:
        assert monitored["path"] == "/metrics"
        assert monitored["port"] == the(overlay, "Service")["spec"]["ports"][0]["name"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_grace_of_a_pod_is_longer_than_its_drain(overlay):
    server = server_of(overlay)
    variables = {each["name"]: each.get("value") for each in server["env"]}
    drain = float(variables["ELASTI_DRAIN_SECONDS"])
    wait = server["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod_of(overlay)["spec"]["terminationGracePeriodSeconds"] >= wait + drain + 10


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_variables_of_a_pod_are_settings(overlay):
    known = {f"ELASTI_{name.upper()}" for name in Settings.model_fields}
    named = {each["name"] for each in server_of(overlay)["env"]}
    assert {name for name in named if name.startswith("ELASTI_")} <= known
    assert "ELASTI_BUILD" not in named  # the image's own


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_traces_leave_only_where_somebody_opens_the_way(overlay, tmp_path):
    kubernetes = shutil.copytree(KUBERNETES, tmp_path / "kubernetes")
    traced = kubernetes / "overlays" / "traced" / "kustomization.yaml"
    traced.parent.mkdir()
    guide = (DEPLOY / "README.md").read_text("utf-8")
    (shown,) = re.findall(r"^```yaml\n(.*?)^```$", guide, flags=re.DOTALL | re.MULTILINE)
    traced.write_text(shown.replace("- ../gpu", f"- ../{overlay}"), "utf-8")
    before, after = built(overlay), built("traced", kubernetes)

    for manifest in after:
        if manifest["kind"] not in SCHEMAS:
            kubernetes_validate.validate(manifest, RELEASES[0], strict=True)
    added = [each for each in ways_out(after) if each not in ways_out(before)]
    assert [each["ports"] for each in added] == [[{"port": 4318}]]
    assert len(ways_out(after)) == len(ways_out(before)) + 1
    (pod,) = [each for each in after if each["kind"] == "Deployment"]
    variables = pod["spec"]["template"]["spec"]["containers"][0]["env"]
    (endpoint,) = [each["value"] for each in variables if each["name"].startswith("OTEL_")]
    assert variables[:-1] == server_of(overlay)["env"]
    (peer,) = added[0]["to"]
    namespace = peer["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]
    assert endpoint == f"http://otel-collector.{namespace}.svc:4318"


def ways_out(manifests: tuple[Manifest, ...]) -> list[Manifest]:
    (policy,) = [each for each in manifests if each["kind"] == "NetworkPolicy"]
    return list(policy["spec"]["egress"])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_image_is_one_of_the_two_that_are_built(overlay):
    name, _, tag = server_of(overlay)["image"].partition(":")
    version, _, target = tag.partition("-")
    project = (DEPLOY.parent / "pyproject.toml").read_text("utf-8")
    assert name == "elastiformer-serve" and target in STAGES
    assert f'\nversion = "{version}"\n' in project
    assert (target == "cuda") == (overlay == "gpu")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_secret_is_committed_and_no_pod_starts_without_one(overlay):
    assert "Secret" not in {each["kind"] for each in built(overlay)}
    (keys,) = [each for each in pod_of(overlay)["spec"]["volumes"] if each["name"] == "keys"]
    assert keys["secret"] == {"secretName": "elastiformer-keys"}
    variables = {each["name"]: each.get("value") for each in server_of(overlay)["env"]}
    assert variables["ELASTI_KEYS_FILE"] == "/keys/keys.json"


def test_the_keys_in_the_guide_are_a_key_file(tmp_path):
    guide = (DEPLOY / "README.md").read_text("utf-8")
    (shown,) = re.findall(r"^```json\n(.*?)^```$", guide, flags=re.DOTALL | re.MULTILINE)
    file = tmp_path / "keys.json"
    file.write_text(json.dumps(json.loads(shown)), "utf-8")
    assert len(read_keys(file)) == 2
    assert "kubectl create secret generic elastiformer-keys --from-file=keys.json" in guide


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_cache_is_one_volume_or_one_for_each_pod(overlay):
    (cache,) = [each for each in pod_of(overlay)["spec"]["volumes"] if each["name"] == "cache"]
    deployment = the(overlay, "Deployment")["spec"]
    claims = [each for each in built(overlay) if each["kind"] == "PersistentVolumeClaim"]
    if overlay in SCALED:
        assert "ephemeral" in cache and not claims
        assert deployment["strategy"]["type"] == "RollingUpdate"
        assert "replicas" not in deployment  # the autoscaler's, or every apply would reset it
    else:
        (claim,) = claims
        assert cache["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert (deployment["replicas"], deployment["strategy"]["type"]) == (1, "Recreate")


def test_the_autoscaler_scales_this_deployment_by_gauges_that_exist():
    scaler = the("autoscale", "HorizontalPodAutoscaler")["spec"]
    deployment = the("autoscale", "Deployment")
    assert scaler["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    named = {each["pods"]["metric"]["name"] for each in scaler["metrics"]}
    assert named == {"elasti_num_requests_waiting", "elasti_num_requests_running"}
    adapter = yaml.safe_load((KUBERNETES / "prometheus-adapter.yaml").read_text("utf-8"))
    offered = {
        name for rule in adapter["rules"]["custom"] for name in names_in(rule["seriesQuery"])
    }
    assert named == offered <= exported()


def test_keda_scales_this_deployment_by_the_same_gauges():
    scaled = the("autoscale-keda", "ScaledObject")["spec"]
    scaler = the("autoscale", "HorizontalPodAutoscaler")["spec"]
    assert scaled["scaleTargetRef"]["name"] == "elastiformer"
    asked = {
        name: int(trigger["metadata"]["threshold"])
        for trigger in scaled["triggers"]
        for name in names_in(trigger["metadata"]["query"])
    }
    assert asked == {
        each["pods"]["metric"]["name"]: int(each["pods"]["target"]["averageValue"])
        for each in scaler["metrics"]
    }


def test_the_gateway_is_told_of_gauges_that_exist_and_of_pods_that_are_there():
    page = (DEPLOY / "gateway.md").read_text("utf-8")
    shown = re.findall(r"^```yaml\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)
    held = {each["kind"]: each for text in shown for each in yaml.safe_load_all(text) if each}
    pickers = held["EndpointPickerConfig"]
    parameters = {each["type"]: each.get("parameters") for each in pickers["plugins"]}
    (engine,) = parameters["core-metrics-extractor"]["engineConfigs"]
    gauges = {engine[f"{what}Spec"] for what in ("queuedRequests", "runningRequests", "kvUsage")}
    assert gauges == {
        "elasti_num_requests_waiting",
        "elasti_num_requests_running",
        "elasti_kv_cache_usage_perc",
    }
    assert gauges <= exported()
    assert parameters["core-metrics-extractor"]["defaultEngine"] == engine["name"]
    (profile,) = pickers["schedulingProfiles"]
    named = {each.get("name", each["type"]) for each in pickers["plugins"]}
    assert {each["pluginRef"] for each in profile["plugins"]} <= named
    pool = held["InferencePool"]["spec"]
    assert pool["selector"]["matchLabels"].items() <= pod_of("cpu")["metadata"]["labels"].items()
    assert pool["targetPorts"] == [{"number": Settings.model_fields["port"].default}]
