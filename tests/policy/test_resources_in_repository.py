"""What the repository itself says about policies is true: examples compile, the reference is that of the code."""

from pathlib import Path

import pytest

from evenhand_policy.config import DEFAULT_TENANT_ID, SchedulerConfig
from evenhand_policy.decode import decode
from evenhand_policy.files import load_policy_directory
from evenhand_policy.pool import EnginePool
from evenhand_policy.schema import Model
from evenhand_policy.spec import TenantPolicy
from evenhand_policy.yaml_reader import read_entries
from schema.reference import replace_tables

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "manifests/examples"
KINDS: dict[str, type[Model]] = {"TenantPolicy": TenantPolicy, "EnginePool": EnginePool}


def test_the_demo_can_be_served() -> None:
    config = load_policy_directory(EXAMPLES / "demo")
    assert [(tenant.tenant_id, tenant.weight, len(tenant.key_hashes)) for tenant in config.tenants] == [
        ("chatbot", 4, 1),
        ("nightly-batch", 1, 1),
        ("research", 2, 1),
    ]


@pytest.mark.parametrize("file", sorted(EXAMPLES.rglob("*.yaml")), ids=lambda file: str(file.relative_to(EXAMPLES)))
def test_every_example_is_valid(file: Path) -> None:
    for entry in read_entries(file.read_bytes()):
        if resource_type := KINDS.get(entry.value["kind"]):
            decode(entry.value, resource_type)


def test_the_reference_of_fields_is_current() -> None:
    text = (ROOT / "docs/policies.md").read_text()
    assert replace_tables(text) == text, "run `make crds` and commit what it writes"
    assert text.count("| `identities[].name` |") == 1


def test_a_reference_without_its_marks_is_an_error() -> None:
    with pytest.raises(ValueError, match="<!-- fields of TenantPolicy -->"):
        replace_tables("# Policies\n")


def test_the_default_tenant_is_the_one_that_the_reference_names() -> None:
    assert f"belongs to the tenant `{DEFAULT_TENANT_ID}`" in (ROOT / "docs/policies.md").read_text()
    assert SchedulerConfig().tenants == ()
