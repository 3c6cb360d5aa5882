"""How a document comes to the pods of a pool, and what keeps it back: canary, versions, size, `paused`, `onDeletion`, liars."""

import asyncio
import base64
import itertools
import random
import re
import secrets
from collections.abc import Iterator

import pytest

from evenhand_policy.bootstrap import mounted_keys, unpack
from evenhand_policy.push_document import open_document
from harness.fixtures import OPERATOR, OPERATOR_NAMESPACE, Operators
from harness.objects import Object, light_engines, policy, pool
from harness.operator_process import OperatorProcess
from harness.stage import Stage, conditions, until

POISON, UNWANTED = "poison", "unwanted"
NUM_ENGINES = 3
NUM_LARGE = 350
NEWER_MEMBER = "tenants.fairness"
MANY_TERMS = 100  # of leaders, which on a busy machine may lose the Lease


@pytest.fixture(scope="module")
def operator(operators: Operators, stage: Stage) -> OperatorProcess:
    """With a pool whose engines die of one tenant, and refuse another."""
    told = (f"--dies-of={POISON}", f"--refuses={UNWANTED}")
    stage.cluster.apply(light_engines(stage.namespace, NUM_ENGINES, *told))
    operator = operators.start(stage.namespace, options=("--relist-seconds=10",))
    stage.kubectl("rollout", "status", "deployment", "engines", "--timeout=120s")
    return operator


@pytest.fixture
def name(stage: Stage, operator: OperatorProcess) -> Iterator[str]:
    """Of a policy of one test, which finds all engines well, and a policy `resident` of weight 1 in force."""
    change_pool(stage)
    stage.apply("resident", weight=1)
    stage.kubectl("scale", "deployment", "engines", f"--replicas={NUM_ENGINES}")
    stage.wait_serving(NUM_ENGINES)
    stage.wait_ready("resident")
    name = f"own-{secrets.token_hex(3)}"
    yield name
    stage.kubectl("delete", "tpol", name, "--ignore-not-found")


def change_pool(stage: Stage, **spec: object) -> None:
    stage.cluster.apply(pool(stage.namespace, **spec))


def message(obj: Object, kind: str) -> str:
    return next(str(each["message"]) for each in obj["status"]["conditions"] if each["type"] == kind)


def restarts(stage: Stage) -> dict[str, int]:
    pods = stage.cluster.find("pods", stage.namespace, "engines=engines")
    return {pod["metadata"]["name"]: pod["status"]["containerStatuses"][0]["restartCount"] for pod in pods}


# ---- canary


def test_pod_that_dies_of_a_document_stops_its_rollout(stage: Stage, operator: OperatorProcess, name: str) -> None:
    before = restarts(stage)
    stage.apply(name, tenant=POISON, weight=5)
    until(lambda: stage.conditions(name)["Programmed"] == ("False", "RolloutStopped"))
    until(lambda: conditions(stage.pool())["Ready"] == ("False", "RolloutStopped"))
    told = re.fullmatch(
        r"pod (\S+) (ended|fell silent) when it was sent the document", message(stage.pool(), "Programmed")
    )
    assert told
    assert "when it was sent the document" in message(stage.policy(name), "Programmed")
    until(lambda: restarts(stage)[told[1]] > before[told[1]])  # it is started again a moment after it ended
    assert stage.conditions("resident")["Ready"] == ("True", "Ready"), "what was in force is in force"
    stage.wait_enforced(POISON, "weight", [None] * NUM_ENGINES)  # nor did it start with it
    stage.apply("resident", weight=2)  # another document, with the poison still in it
    until(lambda: sum(restarts(stage).values()) >= sum(before.values()) + 2)
    until(lambda: stage.conditions("resident")["Programmed"] == ("False", "RolloutStopped"))
    stage.kubectl("delete", "tpol", name)
    stage.wait_ready("resident")
    stage.wait_enforced("resident", "weight", [2] * NUM_ENGINES)  # the one that died is started again
    assert sum(restarts(stage).values()) < sum(before.values()) + 2 * NUM_ENGINES, "all would have died of both"


def test_document_that_pods_refuse_is_not_sent_to_all(stage: Stage, operator: OperatorProcess, name: str) -> None:
    weights = itertools.count(1)

    def two_refuse() -> bool:
        """One that refuses alone might lie. Pods that are slow, on a busy machine, are sent another document."""
        stage.apply(name, tenant=UNWANTED, weight=next(weights))
        stage.wait("Programmed=false", name)
        until(lambda: stage.conditions(name)["Programmed"] == ("False", "RolloutStopped"))
        until(lambda: conditions(stage.pool())["Programmed"] == ("False", "RolloutStopped"))
        why = f"does not take the document: tenants: cannot enforce {UNWANTED} (status 422)"
        states = [row["state"] for row in stage.rows().values()]
        return why in message(stage.policy(name), "Programmed") and states.count("Rejected") == 2

    until(two_refuse)
    stage.kubectl("delete", "tpol", name)
    stage.wait_serving(NUM_ENGINES)


# ---- what is stored


def stored_tenants(stage: Stage) -> list[str]:
    """Of the document that a new pod would find mounted."""
    found = [
        stage.cluster.get("secret", f"evenhand-bootstrap-default-{end}", stage.namespace) for end in ("manifest", "0")
    ]
    files = {name: base64.b64decode(content) for each in found for name, content in each["data"].items()}
    manifest, compressed = unpack(files, mounted_keys(files))
    tenants = {tenant.tenant_id for tenant in open_document(compressed, manifest.digest).tenants}
    return [name for name in ("resident", POISON, UNWANTED) if name in tenants]


def test_bootstrap_secret_that_somebody_deleted_is_restored(stage: Stage, operator: OperatorProcess, name: str) -> None:
    """Without any change: what is stored is looked at from time to time."""
    until(lambda: stored_tenants(stage) == ["resident"])
    for end in ("manifest", "0"):
        stage.kubectl("delete", "secret", f"evenhand-bootstrap-default-{end}")
        until(lambda: stored_tenants(stage) == ["resident"])


# ---- what keeps a document back


def test_paused_pool_keeps_its_document_until_it_goes_on(stage: Stage, operator: OperatorProcess, name: str) -> None:
    change_pool(stage, paused=True)
    stage.apply(name, weight=7)
    until(lambda: stage.conditions(name)["Programmed"] == ("False", "Paused"))
    until(lambda: conditions(stage.pool())["Ready"] == ("False", "Paused"))
    stage.kubectl("scale", "deployment", "engines", f"--replicas={NUM_ENGINES + 1}")
    stage.wait_serving(NUM_ENGINES + 1)
    before = stage.pool()["status"]["epoch"]
    operator.stop()
    operator.start()  # the next leader has not seen what the pool had before
    until(lambda: stage.pool()["status"]["epoch"] > before)
    stage.wait_serving(NUM_ENGINES + 1)
    assert stage.enforced(name, "weight") == [None] * (NUM_ENGINES + 1)
    assert stage.enforced("resident", "weight") == [1] * (NUM_ENGINES + 1)
    change_pool(stage, paused=False)
    stage.wait_ready(name)
    assert stage.enforced(name, "weight") == [7] * (NUM_ENGINES + 1)


def test_document_that_is_too_large_is_not_rolled_out(
    stage: Stage, operator: OperatorProcess, operators: Operators, name: str
) -> None:
    """Names that cannot be compressed, until the bootstrap Secrets, here only one, cannot hold the document."""
    operator.stop()
    small = operators.start(stage.namespace, name="small", module="harness.small_operator")
    large = [large_policy(stage.namespace, f"large-{index}") for index in range(NUM_LARGE)]
    try:
        change_many(stage, "POST", large)
        until(lambda: conditions(stage.pool())["Programmed"] == ("False", "DocumentTooLarge"))
        assert "MiB can be stored; what is in force stays" in message(stage.pool(), "Programmed")
        stage.apply(name, weight=3)
        until(lambda: stage.conditions(name)["Programmed"] == ("False", "DocumentTooLarge"))
        assert stage.enforced(name, "weight") == [None] * NUM_ENGINES
    finally:
        change_many(stage, "DELETE", large)
        small.stop()
        operator.start()
    stage.wait_ready(name)
    assert stage.enforced(name, "weight") == [3] * NUM_ENGINES


def large_policy(namespace: str, name: str) -> Object:
    """Of about 3.3 KB in a document, compressed."""
    visible = "".join(map(chr, range(ord("!"), ord("~") + 1)))
    values = ("".join(random.choices(visible, k=253)) for _ in range(16))
    identities = [
        {"name": f"i{index}", "type": "Header", "header": {"value": value}} for index, value in enumerate(values)
    ]
    return policy(namespace, name, identities=identities)


def change_many(stage: Stage, method: str, objects: list[Object]) -> None:
    """Create or delete policies, some at a time."""
    path = f"/apis/evenhand.dev/v1alpha1/namespaces/{stage.namespace}/tenantpolicies"

    async def change() -> None:
        remaining = iter(objects)

        async def work() -> None:
            for obj in remaining:
                if method == "POST":
                    await client.call("POST", path, obj)
                else:
                    await client.call("DELETE", f"{path}/{obj['metadata']['name']}")

        async with stage.cluster.api_client() as client:
            await asyncio.gather(*(work() for _ in range(16)))

    asyncio.run(change())


# ---- pods of another kind


def test_oldest_pod_of_a_pool_decides_what_is_in_the_document(
    stage: Stage, operator: OperatorProcess, name: str
) -> None:
    stage.cluster.apply(light_engines(stage.namespace, 1, f"--lacks={NEWER_MEMBER}", name="old"))
    try:
        stage.wait_serving(NUM_ENGINES + 1)
        stage.apply(name, weight=4, fairness="PerUser")
        until(lambda: stage.conditions(name)["Programmed"] == ("False", "NotUnderstood"))
        stage.wait_enforced(name, "weight", [4] * (NUM_ENGINES + 1))
        assert set(stage.enforced(name, "fairness")) == {"FIFO"}, "as all of them understand it"
        until(lambda: message(stage.pool(), "Programmed").endswith(f"do not understand it: {NEWER_MEMBER}"))
        stage.apply("resident", weight=5)
        stage.wait_ready("resident")
    finally:
        stage.kubectl("delete", "deployment", "old")
    stage.wait_ready(name)
    assert stage.enforced(name, "fairness") == ["PerUser"] * NUM_ENGINES


def test_pod_whose_clock_is_wrong_is_shown_once(stage: Stage, operator: OperatorProcess, name: str) -> None:
    """What is told of it does not change with its clock, and so is not written anew at every attempt."""

    def refusals() -> float:
        return operator.metric("evenhand_operator_push_errors_total", reason="refused")

    stage.cluster.apply(light_engines(stage.namespace, 1, "--clock-ahead=120", name="skewed"))
    try:
        until(lambda: any("from this engine's clock" in row.get("message", "") for row in stage.rows().values()))
        until(lambda: len(stage.ready_pods()) == NUM_ENGINES + 1)
        until(lambda: conditions(stage.pool())["Programmed"][0] == "False")

        def is_written_no_more() -> bool:
            written, before = stage.pool()["metadata"]["resourceVersion"], refusals()
            until(lambda: refusals() >= before + 3)
            return bool(stage.pool()["metadata"]["resourceVersion"] == written)

        until(is_written_no_more)
    finally:
        stage.kubectl("delete", "deployment", "skewed")


def test_pod_that_claims_an_epoch_that_nobody_made_is_not_believed(
    stage: Stage, operator: OperatorProcess, name: str
) -> None:
    def epoch() -> int:
        lease = stage.cluster.get("lease", OPERATOR, OPERATOR_NAMESPACE)
        return int(lease["metadata"]["annotations"]["evenhand.dev/epoch"])

    before = epoch()
    stage.cluster.apply(light_engines(stage.namespace, 1, f"--claims-epoch={2**63 - 1025}", name="liar"))
    try:
        until(lambda: [row["state"] for pod, row in stage.rows().items() if pod.startswith("liar")] == ["Rejected"])
        stage.apply(name, weight=6)
        until(lambda: [each for each in stage.enforced(name, "weight") if each] == [6] * NUM_ENGINES)
        assert "is not believed" in operator.log.read_text()
        assert epoch() < before + MANY_TERMS
        operator.stop()
        operator.start()  # what the pool's status tells of the pod is no reason to go on above it
        stage.apply(name, weight=8)
        until(lambda: [each for each in stage.enforced(name, "weight") if each] == [8] * NUM_ENGINES)
        assert before < epoch() < before + MANY_TERMS
        until(lambda: stage.pool()["status"]["epoch"] == epoch())
    finally:
        stage.kubectl("delete", "deployment", "liar")
    stage.wait_ready(name)


# ---- the end of a pool


@pytest.mark.parametrize(("on_deletion", "left"), [("Keep", 5), ("Close", None)])
def test_deleted_pool_leaves_its_engines_as_it_says(
    stage: Stage, operator: OperatorProcess, name: str, on_deletion: str, left: int | None
) -> None:
    change_pool(stage, onDeletion=on_deletion)
    stage.apply(name, weight=5)
    stage.wait_ready(name)
    stage.kubectl("delete", "epool", "default")
    stage.wait("Accepted=false", name)
    if on_deletion == "Close":
        until(lambda: {one["config"]["unknownTenants"]["action"] for one in stage.documents()} == {"Reject"})
    assert stage.enforced(name, "weight") == [left] * NUM_ENGINES
    change_pool(stage)
    stage.wait_ready(name)
    assert stage.enforced(name, "weight") == [5] * NUM_ENGINES
