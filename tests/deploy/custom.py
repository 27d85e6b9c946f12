"""Custom resources held against their schemas, and what is wrong with one, by path.

The schemas of KEDA and of the Prometheus operator are theirs: schemas/README.md. For the pool of
the gateway inference extension no package holds one; what its reference allows is written here:
https://gateway-api-inference-extension.sigs.k8s.io/reference/spec/
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import kubernetes_validate
from jsonschema import Draft202012Validator

Schema = dict[str, Any]

_FOLDER = Path(__file__).with_name("schemas")


def _fields(required: str = "", **fields: Schema) -> Schema:
    """An object of these fields and no others."""
    return {
        "type": "object",
        "properties": fields,
        "required": required.split(),
        "additionalProperties": False,
    }


_TEXT: Schema = {"type": "string"}
_NAME: Schema = {"type": "string", "minLength": 1, "maxLength": 253}
_PORT = _fields("number", number={"type": "integer", "minimum": 1, "maximum": 65535})
_LABELS: Schema = {"type": "object", "minProperties": 1, "additionalProperties": _TEXT}
_POOL = _fields(
    "selector targetPorts endpointPickerRef",
    selector=_fields("matchLabels", matchLabels=_LABELS),
    targetPorts={"type": "array", "items": _PORT, "minItems": 1, "maxItems": 8},
    appProtocol={"enum": ["http", "kubernetes.io/h2c"]},
    endpointPickerRef=_fields(
        "name port",  # of a Service; of another kind the port may be absent
        group=_TEXT,
        kind=_NAME,
        name=_NAME,
        port=_PORT,
        failureMode={"enum": ["FailOpen", "FailClose"]},
    ),
)

SCHEMAS: dict[str, Schema] = {
    "ScaledObject": json.loads((_FOLDER / "scaledobject.json").read_text("utf-8")),
    "ServiceMonitor": json.loads((_FOLDER / "servicemonitor.json").read_text("utf-8")),
    "InferencePool": _fields(
        "apiVersion kind metadata spec",
        apiVersion={"const": "inference.networking.k8s.io/v1"},
        kind={"const": "InferencePool"},
        metadata={"type": "object"},
        spec=_POOL,
    ),
}


def faults(manifest: dict[str, Any], release: str = "1.37") -> list[str]:
    """What is wrong with a custom resource, as `path: what`; metadata by Kubernetes' own schema."""
    validator = Draft202012Validator(SCHEMAS[manifest["kind"]])
    found = [f"{each.json_path}: {each.message}" for each in validator.iter_errors(manifest)]
    bare = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": manifest.get("metadata", {})}
    try:
        kubernetes_validate.validate(bare, release, strict=True)
    except kubernetes_validate.ValidationError as error:
        found.append(f"{error.json_path}: {error.message}")
    return sorted(found)
