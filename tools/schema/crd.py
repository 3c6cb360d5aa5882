"""CustomResourceDefinitions written from the structs of `evenhand_policy`, so that there is one source of truth.

`python -m schema.crd FOLDER` (`make crds`) writes them as YAML. Types, bounds, defaults and descriptions come
from the annotations, CEL rules from `Model.rules`.
"""

import sys
from pathlib import Path
from typing import Any

import msgspec
import yaml
from msgspec import inspect
from msgspec.structs import fields as struct_fields

from evenhand_policy.pool import EnginePool
from evenhand_policy.schema import Model
from evenhand_policy.spec import TenantPolicy
from evenhand_policy.status import EnginePoolStatus, TenantPolicyStatus

GROUP = "evenhand.dev"
VERSION = "v1alpha1"

Json = dict[str, Any]

_TENANT_PATH = ".*['tenant','name']"
"""A column shows the first that a JSONPath finds: here spec.tenant, else metadata.name. No other member has either."""


def tenant_policy_crd() -> Json:
    """CustomResourceDefinition of TenantPolicy."""
    columns = [
        _column("Tenant", "string", _TENANT_PATH, "Name of the tenant"),
        _column("Pool", "string", ".spec.poolRef.name", "EnginePool that the policy belongs to"),
        _column("Weight", "integer", ".spec.weight", "Relative share"),
        _column("Class", "string", ".spec.latencyClass", "Latency class"),
        _condition_column("Programmed", "Whether every ready engine enforces the policy"),
        _condition_column("Ready", "Whether the policy is accepted and enforced"),
        _column(
            "Reason", "string", '.status.conditions[?(@.type=="Ready")].reason', "Why it is or is not ready", wide=True
        ),
        _column("Enforcement", "string", ".spec.enforcement", "Enforce or Audit", wide=True),
        _column("Suspended", "boolean", ".spec.suspend", "Whether the tenant is refused", wide=True),
        _AGE,
    ]
    return _definition(TenantPolicy, TenantPolicyStatus, "tenantpolicies", "tpol", columns, [".spec.poolRef.name"])


def engine_pool_crd() -> Json:
    """CustomResourceDefinition of EnginePool."""
    columns = [
        _column("Revision", "integer", ".status.revision", "Number of the current document"),
        _column("Applied", "string", ".status.applied", "Pods that enforce it, of those that are ready"),
        _column("Tenants", "integer", ".status.tenants", "Tenants in it"),
        _condition_column("Ready", "Whether every ready engine enforces it", wide=True),
        _column("Epoch", "integer", ".status.epoch", "Term of the operator that wrote it", wide=True),
        _AGE,
    ]
    return _definition(EnginePool, EnginePoolStatus, "enginepools", "epool", columns, [])


def _column(name: str, kind: str, path: str, description: str, *, wide: bool = False) -> Json:
    column: Json = {"name": name, "type": kind, "jsonPath": path, "description": description}
    return column | ({"priority": 1} if wide else {})


def _condition_column(condition: str, description: str, *, wide: bool = False) -> Json:
    path = f'.status.conditions[?(@.type=="{condition}")].status'
    return _column(condition, "string", path, description, wide=wide)


_AGE = _column("Age", "date", ".metadata.creationTimestamp", "Time since it was created")


def _definition(
    resource: type[Model],
    status: type[Model],
    plural: str,
    short_name: str,
    columns: list[Json],
    selectable: list[str],
) -> Json:
    kind = resource.__name__
    version: Json = {
        "name": VERSION,
        "served": True,
        "storage": True,
        "subresources": {"status": {}},
        "additionalPrinterColumns": columns,
        "schema": {"openAPIV3Schema": _resource_schema(resource, status)},
    }
    if selectable:
        version["selectableFields"] = [{"jsonPath": path} for path in selectable]
    names = {
        "kind": kind,
        "listKind": f"{kind}List",
        "plural": plural,
        "singular": kind.lower(),
        "shortNames": [short_name],
        "categories": ["evenhand"],
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{GROUP}"},
        "spec": {"group": GROUP, "scope": "Namespaced", "names": names, "versions": [version]},
    }


def _resource_schema(resource: type[Model], status: type[Model]) -> Json:
    (spec,) = (field for field in struct_fields(resource) if field.name == "spec")
    return {
        "type": "object",
        "description": resource.__doc__,
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string", "description": f"{GROUP}/{VERSION}."},
            "kind": {"type": "string", "description": f"{resource.__name__}."},
            "metadata": {"type": "object"},
            "spec": _schema(inspect.type_info(spec.type)),
            "status": _schema(inspect.type_info(status)) | {"default": _plain(status())},
        },
    } | _validations(resource)


def _validations(model: type[Any]) -> Json:
    rules = [{"rule": rule.cel, "message": rule.message} for rule in model.rules if rule.cel]
    return {"x-kubernetes-validations": rules} if rules else {}


def _schema(info: inspect.Type) -> Json:
    """Structural schema of a type, as annotations and rules describe it."""
    match info:
        case inspect.Metadata(type=inner, extra_json_schema=more):
            return _schema(inner) | (more or {})
        case inspect.UnionType(types=types):
            (inner,) = (member for member in types if not isinstance(member, inspect.NoneType))
            return _schema(inner)
        case inspect.StructType():
            return _struct_schema(info)
        case inspect.VarTupleType(item_type=item, min_length=least, max_length=most):
            return _bounded({"type": "array", "items": _schema(item)}, minItems=least, maxItems=most)
        case inspect.DictType(value_type=value, max_length=most):
            return _bounded({"type": "object", "additionalProperties": _schema(value)}, maxProperties=most)
        case inspect.EnumType(cls=enum):
            return {"type": "string", "enum": [str(member.value) for member in enum]}
        case inspect.IntType(ge=least, le=most):
            size = "int32" if most is not None and most < 2**31 else "int64"
            return _bounded({"type": "integer", "format": size}, minimum=least, maximum=most)
        case inspect.StrType(min_length=least, max_length=most, pattern=pattern):
            re2 = pattern.replace(r"\Z", "$") if pattern else None  # there, $ is the very end of the text
            return _bounded({"type": "string"}, minLength=least, maxLength=most, pattern=re2)
        case inspect.BoolType():
            return {"type": "boolean"}
    raise TypeError(f"{info} has no structural schema")


def _bounded(schema: Json, **bounds: int | float | str | None) -> Json:
    return schema | {name: bound for name, bound in bounds.items() if bound is not None}


def _struct_schema(info: inspect.StructType) -> Json:
    schema: Json = {"type": "object", "description": info.cls.__doc__, "properties": {}}
    for field in info.fields:
        member = _schema(field.type)
        default = _plain(field.default)
        if default not in (None, msgspec.NODEFAULT, []):
            member["default"] = default
        schema["properties"][field.encode_name] = member
    if required := [field.encode_name for field in info.fields if field.required]:
        schema["required"] = required
    return schema | _validations(info.cls)


def _plain(default: Any) -> Any:
    """A default as JSON; unset members are left out, set ones spelled out, since CEL rules read them."""
    if default is msgspec.NODEFAULT:
        return default
    return _without_none(msgspec.to_builtins(default))


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None and item != ()}
    if isinstance(value, list | tuple):
        return [_without_none(item) for item in value]
    return value


class _Dumper(yaml.SafeDumper):
    """Indents lists below their key, and repeats what is equal instead of naming it."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)

    def ignore_aliases(self, data: Any) -> bool:
        return True


def to_yaml(definition: Json) -> str:
    """The text of the committed file."""
    text = yaml.dump(definition, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)
    return f"# Written by `make crds` from engine/evenhand_policy; change it there.\n{text}"


def definitions() -> dict[str, str]:
    """Content of each file of the folder `crds` by name."""
    crds = (tenant_policy_crd(), engine_pool_crd())
    return {f"{GROUP}_{crd['spec']['names']['plural']}.yaml": to_yaml(crd) for crd in crds}


def main(folder: Path) -> None:
    """Write the files."""
    folder.mkdir(exist_ok=True)
    for name, text in definitions().items():
        (folder / name).write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
