"""Objects that tests apply."""

import base64
import sys
from pathlib import Path
from typing import Any

from evenhand_policy.push_protocol import POD_TOKEN_AUDIENCE

Object = dict[str, Any]

ENGINE_LABELS = {"app": "evenhand-engine"}
ADMIN_PORT = 9000


def resource(kind: str, namespace: str, name: str, **spec: Any) -> Object:
    """An object of our own group."""
    metadata = {"name": name, "namespace": namespace}
    return {"apiVersion": "evenhand.dev/v1alpha1", "kind": kind, "metadata": metadata, "spec": spec}


def pool(namespace: str, name: str = "default", **spec: Any) -> Object:
    """An EnginePool of the pods with `ENGINE_LABELS`."""
    return resource("EnginePool", namespace, name, **({"selector": {"matchLabels": ENGINE_LABELS}} | spec))


def policy(namespace: str, name: str, **spec: Any) -> Object:
    """A TenantPolicy of the pool `default`."""
    return resource("TenantPolicy", namespace, name, **spec)


def api_key(secret: str, name: str = "keys") -> Object:
    """An identity: the keys in a Secret."""
    return {"name": name, "type": "APIKey", "apiKey": {"secretRef": {"name": secret}}}


def secret(namespace: str, name: str, **values: str) -> Object:
    """An opaque Secret."""
    data = {key: base64.b64encode(value.encode()).decode() for key, value in values.items()}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name, "namespace": namespace}, "data": data}


def light_engines(namespace: str, replicas: int, *options: str, pool: str = "default", name: str = "engines") -> Object:
    """A Deployment whose pods run the engine's real admin code and nothing else; volumes are those of the manifests."""
    bootstrap: list[Object] = [{"secret": {"name": f"evenhand-bootstrap-{pool}-manifest"}}]
    bootstrap += [{"secret": {"name": f"evenhand-bootstrap-{pool}-{index}", "optional": True}} for index in range(8)]
    token = {"path": "token", "audience": POD_TOKEN_AUDIENCE, "expirationSeconds": 3600}
    container = {
        "name": "engine",
        "image": "light-engine",
        "command": [sys.executable, "-m", "harness.light_engine"],
        "args": [
            "--host=0.0.0.0",
            f"--port={ADMIN_PORT}",
            f"--pool={namespace}/{pool}",
            "--bootstrap=/etc/evenhand/bootstrap",
            "--pod-token=/etc/evenhand/identity/token",
            *options,
            "--last-good=/var/lib/evenhand/last-good.json",
        ],
        "env": [{"name": "PYTHONPATH", "value": str(Path(__file__).parents[1])}],
        "ports": [{"name": "admin", "containerPort": ADMIN_PORT}],
        # once ready, it stays so while its process is stopped: the operator loses it, the Service would not
        "readinessProbe": {"httpGet": {"path": "/health", "port": "admin"}, "failureThreshold": 1000},
        "volumeMounts": [
            {"name": "bootstrap", "mountPath": "/etc/evenhand/bootstrap"},
            {"name": "identity", "mountPath": "/etc/evenhand/identity"},
            {"name": "state", "mountPath": "/var/lib/evenhand"},
        ],
    }
    volumes = [
        {"name": "bootstrap", "projected": {"sources": bootstrap}},
        {"name": "identity", "projected": {"sources": [{"serviceAccountToken": token}]}},
        {"name": "state", "emptyDir": {}},
    ]
    labels = ENGINE_LABELS | {"engines": name}
    told = {"evenhand.dev/pool": pool}
    template = {
        "metadata": {"labels": labels | told},
        "spec": {"containers": [container], "volumes": volumes, "terminationGracePeriodSeconds": 1},
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"replicas": replicas, "selector": {"matchLabels": labels}, "template": template},
    }


def service_account(name: str, identity: str = "workload") -> Object:
    """An identity: a ServiceAccount of the policy's namespace."""
    return {"name": identity, "type": "ServiceAccount", "serviceAccount": {"name": name}}
