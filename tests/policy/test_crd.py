"""The committed CRDs are those that the structs describe. What an API server makes of them: e2e/test_crds.py."""

from pathlib import Path
from typing import Any

import pytest

from schema.crd import definitions, engine_pool_crd, tenant_policy_crd

CRDS = Path(__file__).parents[2] / "crds"


def test_the_committed_files_are_current() -> None:
    committed = {path.name: path.read_text() for path in CRDS.glob("evenhand.dev_*.yaml")}
    assert committed == definitions(), "run `make crds` and commit what it writes"


def schemas(schema: dict[str, Any], path: str) -> list[tuple[str, dict[str, Any]]]:
    """The schema and everything below it."""
    found = [(path, schema)]
    for name, member in schema.get("properties", {}).items():
        found += schemas(member, f"{path}.{name}")
    for keyword in ("items", "additionalProperties"):
        if keyword in schema:
            found += schemas(schema[keyword], f"{path}[]")
    return found


@pytest.mark.parametrize("crd", [tenant_policy_crd(), engine_pool_crd()], ids=["TenantPolicy", "EnginePool"])
def test_every_field_is_described_and_bounded(crd: dict[str, Any]) -> None:
    root = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    for path, schema in schemas(root["properties"]["spec"], "spec") + schemas(root["properties"]["status"], "status"):
        match schema["type"]:
            case "string":
                assert "maxLength" in schema or "enum" in schema or "format" in schema, path
            case "integer":
                assert "minimum" in schema, path
                assert "maximum" in schema or schema["format"] == "int64", path
            case "array":
                assert "maxItems" in schema, path
            case "object" if "additionalProperties" in schema:
                assert "maxProperties" in schema, path
        assert path.endswith("[]") or schema["description"].endswith("."), path
