"""Write the schemas of custom resources that lie beside this file, out of packages that hold them.

    pip download --no-deps --python-version 3.14 --only-binary :all: --dest FOLDER \\
        cloudcoil-models-keda==2.20.2.1 cloudcoil-models-prometheus-operator==0.93.1.1
    cd FOLDER && unzip '*.whl'
    python tests/deploy/schemas/extract.py FOLDER

The packages are models of pydantic, written by a program from the operators' definitions. Left out
are prose, defaults and the status. A field that may be absent may not be null, and where fields are
named no other is allowed: so a cluster with strict field validation takes them.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Never, Self

import pydantic

KINDS = {
    "scaledobject": ("keda/v1alpha1.py", "ScaledObject"),
    "servicemonitor": ("prometheus_operator/v1.py", "ServiceMonitor"),
}
PROSE = ("title", "description", "default", "examples")


class Anything:
    """In place of what the models import and no schema needs: builders, a client."""

    Builder = BuilderContext = object

    def __class_getitem__(cls, _: object) -> type[Anything]:
        return cls


class Meta(pydantic.BaseModel):
    """In place of the metadata that all resources share: Kubernetes' own schemas have it."""

    Builder: ClassVar[type] = object
    BuilderContext: ClassVar[type] = object


def main() -> None:
    folder = Path(sys.argv[1]) / "cloudcoil" / "models"
    stand_in("cloudcoil.pydantic", BaseModel=pydantic.BaseModel, Never=Never, Self=Self)
    stand_in("cloudcoil.apimachinery", ObjectMeta=Meta)
    stand_in("cloudcoil.resources", Resource=pydantic.BaseModel)
    for name, (file, kind) in KINDS.items():
        found = importlib.util.spec_from_file_location(name, folder / file)
        assert found is not None and found.loader is not None, f"no {file} in {folder}"
        sys.modules[name] = module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
        written = getattr(module, kind).model_json_schema(by_alias=True)
        properties = written["properties"]
        whole = {
            "type": "object",
            "required": ["apiVersion", "kind", "metadata", "spec"],
            "additionalProperties": False,
            "properties": {
                "apiVersion": {"const": properties["apiVersion"]["const"]},
                "kind": {"const": properties["kind"]["const"]},
                "metadata": {"type": "object"},
                "spec": plain(properties["spec"], written["$defs"]),
            },
        }
        path = Path(__file__).with_name(f"{name}.json")
        path.write_text(json.dumps(whole, indent=1) + "\n", "utf-8")


def stand_in(name: str, **held: object) -> None:
    module = ModuleType(name)
    module.__dict__.update(held)
    module.__dict__["__getattr__"] = lambda _: Anything
    sys.modules[name] = module


def plain(schema: Any, definitions: dict[str, Any]) -> Any:
    """A schema without references, prose and nulls, that names every field it allows."""
    if "$ref" in schema:
        return plain(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    choices = [each for each in schema.get("anyOf", ()) if each.get("type") != "null"]
    if len(choices) == 1:
        return plain(choices[0], definitions)
    kept = {key: value for key, value in schema.items() if key not in PROSE}
    if choices:
        kept["anyOf"] = [plain(each, definitions) for each in choices]
    if isinstance(kept.get("items"), dict):
        kept["items"] = plain(kept["items"], definitions)
    if isinstance(kept.get("additionalProperties"), dict):
        kept["additionalProperties"] = plain(kept["additionalProperties"], definitions)
    if "properties" in kept:
        fields = kept["properties"].items()
        kept["properties"] = {name: plain(field, definitions) for name, field in fields}
        kept.setdefault("additionalProperties", False)
    return kept


if __name__ == "__main__":
    main()
