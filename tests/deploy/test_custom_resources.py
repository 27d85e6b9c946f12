"""Promises of custom resources: they keep to their schemas, and no misspelling does."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from tests.deploy.custom import SCHEMAS, faults
from tests.deploy.test_kubernetes import DEPLOY, SCALED, WITH_KUBECTL, built, the

pytestmark = WITH_KUBECTL

MONITOR = ("autoscale", "ServiceMonitor")
SCALER = ("autoscale-keda", "ScaledObject")


def in_the_gateway_page() -> dict[str, Any]:
    page = (DEPLOY / "gateway.md").read_text("utf-8")
    shown = re.findall(r"^```yaml\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)
    return {each["kind"]: each for text in shown for each in yaml.safe_load_all(text) if each}


@pytest.mark.parametrize("kind", SCHEMAS)
def test_a_schema_is_one(kind):
    Draft202012Validator.check_schema(SCHEMAS[kind])


@pytest.mark.parametrize("overlay", SCALED)
def test_custom_resources_keep_to_their_schemas(overlay):
    custom = [each for each in built(overlay) if each["kind"] in SCHEMAS]
    assert {each["kind"] for each in custom} >= {"ServiceMonitor"}
    assert [fault for each in custom for fault in faults(each)] == []


def test_the_pool_in_the_gateway_page_keeps_to_its_schema():
    assert faults(in_the_gateway_page()["InferencePool"]) == []


@pytest.mark.parametrize(
    ("where", "path", "value", "fault"),
    [
        (MONITOR, "spec.endpoints.0.intervall", "15s", r"endpoints\[0\]: .*'intervall' was unexp"),
        (MONITOR, "spec.endpoints.0.interval", 15, r"endpoints\[0\]\.interval: 15 is not of type"),
        (MONITOR, "spec.endpoints.0.interval", "15 s", r"interval: '15 s' does not match"),
        (MONITOR, "spec.selector.matchLabls", {"a": "b"}, r"spec\.selector: .*'matchLabls'"),
        (MONITOR, "spec.selector.matchLabels.a", 1, r"matchLabels\.a: 1 is not of type 'string'"),
        (MONITOR, "metadata.labls", {}, r"metadata: .*'labls' was unexpected"),
        (MONITOR, "status", {}, r"\$: .*'status' was unexpected"),
        (MONITOR, "apiVersion", "monitoring.coreos.com/v2", r"coreos.com/v1' was expected"),
        (SCALER, "spec.minReplicaCount", "two", r"minReplicaCount: 'two' is not of type 'integer'"),
        (SCALER, "apiVersion", "keda.sh/v9", r"apiVersion: 'keda.sh/v1alpha1' was expected"),
        (SCALER, "spec.advanced.horizontalPodAutoscalrConfig", {}, r"advanced: .*AutoscalrConfig'"),
        (
            SCALER,
            "spec.advanced.horizontalPodAutoscalerConfig.behavior.scaleDown.policies.0.periodSecs",
            60,
            r"policies\[0\]: .*'periodSecs' was unexpected",
        ),
        (SCALER, "spec.triggers.0.metadata.threshold", 4, r"threshold: 4 is not of type 'string'"),
        (SCALER, "spec.triggers", [], r"triggers: \[\] should be non-empty"),
        (SCALER, "spec.fallback.behaviour", "static", r"fallback: .*'behaviour' was unexpected"),
        (None, "spec.targetPorts.0.number", 80000, r"number: 80000 is greater than the maximum"),
        (None, "spec.endpointPickerRef.failureMode", "FailShut", r"'FailShut' is not one of"),
        (None, "spec.endpointPickerReff", {}, r"spec: .*'endpointPickerReff' was unexpected"),
    ],
)
def test_a_misspelling_is_named_with_its_place(where, path, value, fault):
    whole = the(*where) if where else in_the_gateway_page()["InferencePool"]
    wrong = copy.deepcopy(whole)
    *way, last = [int(step) if step.isdigit() else step for step in path.split(".")]
    place: Any = wrong
    for step in way:
        place = place[step]
    place[last] = value
    (found,) = faults(wrong)
    assert re.search(fault, found), found


def test_a_field_that_is_needed_is_missed():
    monitor = copy.deepcopy(the(*MONITOR))
    del monitor["spec"]["selector"]
    assert faults(monitor) == ["$.spec: 'selector' is a required property"]


def test_a_trigger_of_keda_asks_prometheus_by_names_that_it_knows():
    for trigger in the(*SCALER)["spec"]["triggers"]:
        assert trigger["type"] == "prometheus"
        assert set(trigger["metadata"]) == {"serverAddress", "query", "threshold"}
