"""A repository of policies and its pipeline, by kubectl as GitOps controllers apply: nothing differs once all is enforced, what leaves the
repository leaves the cluster, a second manager is no obstacle, and a bad policy holds up no other."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from cluster.client import KubectlError
from cluster.control_plane import ControlPlane
from cluster.pod_runner import PodRunner
from harness.fixtures import Operators
from harness.objects import light_engines, policy, pool
from harness.stage import Stage, until

MANAGER = "kustomize-controller"
APPLY = ["apply", "--server-side", f"--field-manager={MANAGER}", "--validate=strict"]
PRUNE = ["--prune", "-l", "team=chat", "--prune-allowlist=evenhand.dev/v1alpha1/TenantPolicy"]


class Repository(Stage):
    """Files of policies, applied as one commit."""

    def __init__(self, cluster: ControlPlane, namespace: str, folder: Path) -> None:
        super().__init__(cluster, namespace)
        self.folder = folder

    def commit(self, **policies: dict[str, object]) -> None:
        """The repository has these policies and no others."""
        for path in self.folder.iterdir():
            path.unlink()
        for name, spec in policies.items():
            document = policy(self.namespace, name, **spec)
            document["metadata"]["labels"] = {"team": "chat"}
            (self.folder / f"{name}.yaml").write_text(yaml.safe_dump(document))

    def sync(self, *options: str) -> str:
        """Applies the folder as a controller does. Raises KubectlError where an object is refused."""
        return self.cluster.kubectl(*APPLY, *options, "-f", str(self.folder))

    def difference(self) -> str:
        """What a sync would change. Raises KubectlError, with it, where there is any."""
        options = ["diff", "--server-side", f"--field-manager={MANAGER}"]
        return self.cluster.kubectl(*options, "-f", str(self.folder))

    def judged(self) -> dict[str, str]:
        """What kstatus says of each policy."""
        found = self.cluster.kstatus(self.cluster.find("tpol", self.namespace))
        return {each["name"]: each["status"] for each in found}

    def names(self) -> set[str]:
        """The policies in the cluster."""
        return {each["metadata"]["name"] for each in self.cluster.find("tpol", self.namespace)}


@pytest.fixture(scope="module")
def served(cluster: ControlPlane, served_namespace: str, operators: Operators) -> Iterator[Stage]:
    with PodRunner(cluster, served_namespace):
        cluster.apply(pool(served_namespace), light_engines(served_namespace, 1))
        operators.start(served_namespace)
        stage = Stage(cluster, served_namespace)
        stage.wait_serving(1)
        yield stage


@pytest.fixture
def repository(served: Stage, tmp_path: Path) -> Iterator[Repository]:
    folder = tmp_path / "policies"
    folder.mkdir()
    yield Repository(served.cluster, served.namespace, folder)
    served.kubectl("delete", "tpol", "--all")


def test_nothing_differs_once_the_operator_has_said_what_it_thinks(repository: Repository) -> None:
    """It writes statuses alone: no spec, no annotation, no finalizer."""
    repository.commit(chat={"weight": 2}, search={"identities": []}, minimal={})
    repository.sync()
    repository.wait_ready("chat", "search", "minimal")  # before that a status may be written while kubectl compares
    assert repository.difference() == ""
    repository.commit(chat={"weight": 3}, search={"identities": []}, minimal={})
    with pytest.raises(KubectlError, match=r"\+  weight: 3"):
        repository.difference()


def test_what_leaves_the_repository_leaves_the_cluster(repository: Repository) -> None:
    repository.commit(chat={}, search={})
    prune = ["apply", *PRUNE, "-f", str(repository.folder)]  # kubectl prunes what was applied on the client's side
    repository.cluster.kubectl(*prune)
    repository.cluster.apply(policy(repository.namespace, "of-another-team"))
    repository.wait_ready("chat", "search")
    repository.commit(search={"weight": 2})
    repository.cluster.kubectl(*prune)
    repository.wait_ready("search")
    assert repository.names() == {"search", "of-another-team"}
    until(lambda: "chat" not in repository.tenants()[0])


def test_policy_that_breaks_the_schema_holds_up_no_other(repository: Repository) -> None:
    repository.commit(chat={}, bad={"weight": 0}, search={})
    with pytest.raises(KubectlError, match=r"spec\.weight: Invalid value: 0"):
        repository.sync()
    repository.wait_ready("chat", "search")
    assert repository.names() == {"chat", "search"}


def test_policy_that_the_operator_refuses_shows_red_and_holds_up_no_other(repository: Repository) -> None:
    repository.commit(chat={"tenant": "seat"}, search={})
    repository.sync()
    repository.wait_ready("chat", "search")
    repository.commit(chat={"tenant": "seat"}, thief={"tenant": "seat"}, search={"weight": 3})
    repository.sync()
    repository.wait_ready("chat", "search")
    repository.wait("Stalled", "thief")
    expected = {"chat": "Current", "search": "Current", "thief": "Failed"}
    until(lambda: repository.judged() == expected)
    assert repository.difference() == ""


def test_somebody_elses_field_is_theirs_until_the_repository_takes_it(repository: Repository) -> None:
    repository.commit(chat={"weight": 2})
    repository.sync()
    repository.wait_ready("chat")
    patch = ["patch", "tpol", "chat", "--type=merge", "-p"]
    repository.kubectl(*patch, '{"spec": {"suspend": true}}', "--field-manager=on-call")
    repository.wait_ready("chat")
    assert repository.difference() == "", "the repository says nothing of it"
    repository.sync()
    assert repository.policy("chat")["spec"]["suspend"] is True
    repository.commit(chat={"weight": 2, "suspend": False})
    with pytest.raises(KubectlError, match=r'conflict with "on-call"'):
        repository.sync()
    repository.sync("--force-conflicts")  # as Argo CD and Flux do
    repository.wait_ready("chat")
    assert repository.enforced("chat", "suspended") in ([False], [None])
