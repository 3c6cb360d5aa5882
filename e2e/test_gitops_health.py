"""Argo CD, by the Lua that we ship, and Flux, by its own library, judge an object alike at every point of its life."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from lupa.lua51 import LuaRuntime  # the version that Argo CD runs

from cluster import build
from cluster.control_plane import ControlPlane

ARGOCD = build.SOURCES.parents[1] / "manifests/argocd"

Object = dict[str, Any]


def policy(generation: int, observed: int | None, **conditions: str) -> Object:
    """A TenantPolicy whose conditions have the given statuses, and their own names as messages."""
    rows = [
        {"type": kind, "status": status, "reason": "Test", "message": f"{kind} is {status}"}
        for kind, status in conditions.items()
    ]
    status = {"conditions": rows} | ({} if observed is None else {"observedGeneration": observed})
    metadata = {"name": "chatbot", "namespace": "inference", "generation": generation}
    return {
        "apiVersion": "evenhand.dev/v1alpha1",
        "kind": "TenantPolicy",
        "metadata": metadata,
        "spec": {},
        "status": status,
    }


DELETED = policy(1, 1, Ready="True")
DELETED["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"

LIFE = {
    "created, with the defaults of the schema": (policy(1, None, Ready="Unknown"), "Progressing", "InProgress"),
    "accepted": (policy(1, 1, Accepted="True", Ready="False", Stalled="False"), "Progressing", "InProgress"),
    "enforced": (policy(1, 1, Accepted="True", Ready="True", Stalled="False"), "Healthy", "Current"),
    "edited": (policy(2, 1, Accepted="True", Ready="True", Stalled="False"), "Progressing", "InProgress"),
    "in conflict": (policy(2, 2, Accepted="False", Ready="False", Stalled="True"), "Degraded", "Failed"),
    "in conflict, and edited": (
        policy(3, 2, Accepted="False", Ready="False", Stalled="True"),
        "Progressing",
        "InProgress",
    ),
    "being deleted": (DELETED, "Progressing", "Terminating"),
}


@pytest.mark.parametrize("point", LIFE)
def test_argo_cd_and_flux_agree(cluster: ControlPlane, point: str) -> None:
    subject, argo, flux = LIFE[point]
    assert health(subject)["status"] == argo
    assert [each["status"] for each in cluster.kstatus([subject])] == [flux]


def test_people_are_told_the_conditions_message() -> None:
    assert health(policy(1, 1, Ready="True"))["message"] == "Ready is True"
    assert health(policy(1, 1, Ready="False"))["message"] == "Ready is False"
    assert health(policy(1, 1, Ready="False", Stalled="True"))["message"] == "Stalled is True"


def test_object_without_status_is_waited_for() -> None:
    bare = policy(1, None)
    del bare["status"]
    assert health(bare) == {"status": "Progressing", "message": "waiting for the operator"}


def test_what_is_true_of_no_or_an_older_generation_is_waited_for() -> None:
    """kstatus has the defaults of our schema to go by; a status from elsewhere may lack what they tell."""
    assert health(policy(1, None, Ready="True")) == {"status": "Progressing", "message": "waiting for the operator"}
    older = policy(2, 2, Ready="True")
    older["status"]["conditions"][0]["observedGeneration"] = 1
    assert health(older)["status"] == "Progressing"
    older["status"]["conditions"][0]["observedGeneration"] = 2
    assert health(older)["status"] == "Healthy"


def test_component_adds_the_script_to_argo_cds_own_settings(cluster: ControlPlane, tmp_path: Path) -> None:
    settings = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "argocd-cm", "namespace": "argocd"},
        "data": {"url": "kept"},
    }
    (tmp_path / "argocd-cm.yaml").write_text(yaml.safe_dump(settings))
    component = Path(*[".."] * len(tmp_path.resolve().parts[1:]), *ARGOCD.resolve().parts[1:])
    kustomization = {"resources": ["argocd-cm.yaml"], "components": [str(component)]}
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    data = yaml.safe_load(cluster.kubectl("kustomize", str(tmp_path)))["data"]
    script = (ARGOCD / "health.lua").read_text()
    kinds = ("TenantPolicy", "EnginePool")
    assert data == {"url": "kept"} | {f"resource.customizations.health.evenhand.dev_{kind}": script for kind in kinds}


def health(subject: Object) -> Object:
    """What Argo CD's Lua runtime answers for an object."""
    lua = LuaRuntime(unpack_returned_tuples=True)
    lua.globals().obj = lua.table_from(subject, recursive=True)
    return dict(lua.execute((ARGOCD / "health.lua").read_text()))
