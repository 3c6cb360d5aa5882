"""On a real node: the sidecar beside an engine that is not ours to change, told by the operator, ended in the right order.

The foreign engine is our own as a first-come-first-served one, on the address and port that the component's users give theirs. The tests are
one story, in this order.
"""

from collections.abc import Iterator

import pytest
import yaml

from harness.node_installation import NAMESPACE, REQUESTS, SIZES, NodeInstallation
from harness.stage import until

pytestmark = [pytest.mark.node, pytest.mark.timeout(1200)]

FOREIGN = "deployment/foreign"
LABELS = {"app": "foreign"}

DEPLOYMENT = f"""
apiVersion: apps/v1
kind: Deployment
metadata:
  name: foreign
  namespace: {NAMESPACE}
  labels: {{evenhand.dev/sidecar: inject}}
spec:
  replicas: 2
  strategy: {{rollingUpdate: {{maxSurge: 0, maxUnavailable: 1}}}}
  selector: {{matchLabels: {{app: foreign}}}}
  template:
    metadata: {{labels: {{app: foreign}}}}
    spec:
      automountServiceAccountToken: false
      containers:
        - name: engine
          image: evenhand.dev/engine:dev
          command: [evenhand, serve, --host=127.0.0.1, --port=8001, --admin-port=9001, --scheduling-policy=fcfs]
          env: [{{name: HOME, value: /tmp}}]
          securityContext:
            runAsNonRoot: true
            runAsUser: 65532
            allowPrivilegeEscalation: false
            capabilities: {{drop: [ALL]}}
            seccompProfile: {{type: RuntimeDefault}}
"""

SERVICE = {
    "apiVersion": "v1",
    "kind": "Service",
    "metadata": {"name": "evenhand-engine", "namespace": NAMESPACE},
    "spec": {"selector": LABELS, "ports": [{"name": "http", "port": 8000, "targetPort": "http"}]},
}


@pytest.fixture(scope="module")
def installation(node_installation: NodeInstallation) -> Iterator[NodeInstallation]:
    """With the sidecar before two foreign engines, and the operator that tells it; gone at the end."""
    before = node_installation.cluster.everything()
    deployment = yaml.safe_load(DEPLOYMENT)
    [engine] = deployment["spec"]["template"]["spec"]["containers"]
    engine["command"] += SIZES
    engine["resources"] = {"requests": REQUESTS, "limits": {"memory": "4Gi"}}
    selector = {"op": "replace", "path": "/spec/selector/matchLabels", "value": LABELS}
    smaller = {"op": "replace", "path": "/spec/template/spec/initContainers/0/resources/requests"}
    kustomization = {
        "resources": ["base/operator", "base/pool"],
        "components": ["components/sidecar"],
        "images": [{"name": f"evenhand.dev/{name}", "newTag": "dev"} for name in ("operator", "engine")],
        "replicas": [{"name": "evenhand-operator", "count": 1}],
        "patches": [
            {"target": {"kind": "EnginePool"}, "patch": yaml.safe_dump([selector])},
            {
                "target": {"kind": "Deployment", "name": "foreign"},
                "patch": yaml.safe_dump([smaller | {"value": {"cpu": "100m", "memory": "256Mi"}}]),
            },
        ],
    }
    overlay = node_installation.write_overlay("sidecar", kustomization, deployment, SERVICE)
    node_installation.install(overlay)
    yield node_installation
    node_installation.uninstall(overlay)
    until(lambda: node_installation.cluster.everything() <= before)


def test_operator_knows_sidecars_for_what_they_are(installation: NodeInstallation) -> None:
    until(lambda: installation.pool()["status"]["applied"] == "2/2", timeout=180)
    assert {row["backend"] for row in installation.rows().values()} == {"evenhand"}  # what it stands before


def test_policy_holds_for_an_engine_that_knows_none(installation: NodeInstallation) -> None:
    for suspended, outcome in ((True, "tenant_suspended"), (False, "ok")):
        patch = f'{{"spec": {{"suspend": {str(suspended).lower()}}}}}'
        installation.kubectl("patch", "tpol", "chat", "--type=merge", "-p", patch)
        installation.wait_ready("chat")
        assert installation.load(4, 2) == {outcome: 4}


def test_rolling_update_under_load_fails_no_request(installation: NodeInstallation) -> None:
    """The sidecar drains first, then the engine ends, then the sidecar."""
    old = {pod["metadata"]["uid"] for pod in installation.cluster.find("pods", NAMESPACE)}
    with installation.under_load(at_once=2, per_second=5) as outcomes:
        installation.kubectl("set", "env", FOREIGN, "GENERATION=2")
        installation.roll_out(FOREIGN)
    assert outcomes.keys() == {"ok"}
    until(lambda: not old & {pod["metadata"]["uid"] for pod in installation.cluster.find("pods", NAMESPACE)})
    statuses = [
        status
        for pod in installation.cluster.find("pods", NAMESPACE)
        for kind in ("initContainerStatuses", "containerStatuses")
        for status in pod["status"][kind]
    ]
    assert [status["restartCount"] for status in statuses] == [0, 0, 0, 0]
