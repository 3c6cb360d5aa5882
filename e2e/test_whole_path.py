"""The whole path: kubectl, a real API server, the operator with the manifests' rights, engines with a real model, clients.

What is told by engines here is told by their own counters, in tokens. Faults that need no model are in
test_operator_faults.py.
"""

import os
import signal
from contextlib import ExitStack

import openai
import pytest

from harness.flood import PROMPT_TOKENS, flood, wait_until_backlogged
from harness.installation import MOST_RUNNING, TOKENS_PER_STEP, Engine, Installation, key_of
from harness.objects import api_key, policy, secret, service_account
from harness.stage import until

INPUT_PRICE, OUTPUT_PRICE = 1, 2
BOUND = 2 * (TOKENS_PER_STEP * OUTPUT_PRICE + TOKENS_PER_STEP * INPUT_PRICE + MOST_RUNNING * OUTPUT_PRICE)
"""Of docs/fairness.md, guarantee 1, where the least weight is 1 and nobody has to be preempted, so without `L*p + θ`."""
LONG = 7000
"""Tokens of a stream that ends with its client."""
WINDOW = 1200
"""Service over which shares are compared."""


# ---- shares


def lead(installation: Installation, ahead: str, behind: str, weight: int) -> list[float]:
    """How far one tenant's weighted service gets ahead of another's, of weight 1, during a window, in each engine."""
    engines = installation.engines()
    before = {engine: engine.service(ahead, behind) for engine in engines}
    until(lambda: all(sum(engine.service(ahead, behind)) - sum(before[engine]) > WINDOW for engine in engines), 600)
    states = [engine.tenants()[name] for engine in engines for name in (ahead, behind)]
    assert all(state["lag"] <= state["lagBound"] for state in states), "by the engines' own account"
    received = [
        [now - then for now, then in zip(engine.service(ahead, behind), before[engine], strict=True)]
        for engine in engines
    ]
    return [first / weight - second for first, second in received]


def test_shares_follow_the_weight_that_was_applied(installation: Installation) -> None:
    keys = [installation.admit("red"), installation.admit("blue")]
    engines = installation.engines()
    with flood(engines, keys, in_flight=6):
        wait_until_backlogged(engines, "red", "blue")
        assert all(abs(each) <= BOUND for each in lead(installation, "red", "blue", weight=1))
        installation.admit("red", weight=4)
        assert all(abs(each) <= BOUND for each in lead(installation, "red", "blue", weight=4))
    installation.dismiss("red", "blue")


def test_tenant_that_was_just_applied_is_next_under_a_flood(installation: Installation) -> None:
    batch = installation.admit("batch", latencyClass="Batch")
    engines = installation.engines()
    with flood(engines, [batch], in_flight=40):
        wait_until_backlogged(engines, "batch", waiting=30)
        assert 30 * PROMPT_TOKENS > 4 * BOUND, "in order of arrival it would be its turn after much more than the bound"
        assert installation.answers(key_of("chat")) == ["invalid_api_key"] * 2
        chat = installation.admit("chat", weight=4, latencyClass="Interactive")
        for engine in engines:
            until(lambda engine=engine: service_before_first_token(engine, chat, "batch") <= BOUND)
    installation.dismiss("batch", "chat")


def service_before_first_token(engine: Engine, key: str, other: str) -> int:
    """What another tenant is given meanwhile, and while the counters are asked for: on a busy machine that may be long."""
    [before] = engine.service(other)
    with engine.stream(key, num_tokens=4):
        [after] = engine.service(other)
    return after - before


# ---- the life of a policy, as its tenant's clients see it


@pytest.mark.parametrize(("end", "code"), [("delete", "invalid_api_key"), ("suspend", "tenant_suspended")])
def test_tenant_that_goes_is_refused_at_once_but_what_runs_is_served(
    installation: Installation, end: str, code: str
) -> None:
    key = installation.admit("leaver")
    engines = installation.engines()
    with ExitStack() as stack:
        for engine in engines:
            stack.enter_context(engine.stream(key, num_tokens=LONG))  # which outlasts what is looked at here
        streams = [stack.enter_context(engine.stream(key, num_tokens=600)) for engine in engines]
        if end == "delete":
            installation.dismiss("leaver")
        else:
            installation.admit("leaver", suspend=True)
        until(lambda: installation.answers(key) == [code] * 2)
        owner = "default" if end == "delete" else "leaver"  # who is charged for what a deleted tenant has left
        until(lambda: all(engine.tenants()[owner].get("running") for engine in engines))
        assert [last(stream) for stream in streams] == ["length"] * 2
    installation.kubectl("delete", "tpol", "leaver", "--ignore-not-found")


def last(stream: openai.Stream[openai.types.Completion]) -> str | None:
    """How a stream ends."""
    *_, chunk = stream
    return chunk.choices[0].finish_reason


def test_conflict_leaves_the_elder_its_tenant_and_its_key(installation: Installation) -> None:
    elder = installation.admit("elder", tenant="seat")
    installation.apply("younger", tenant="seat")
    installation.cluster.apply(policy(installation.namespace, "thief", identities=[api_key("elder-keys")]))
    installation.wait("Accepted=false", "younger", "thief")
    assert installation.conditions("younger")["Accepted"] == ("False", "Conflicted")
    assert installation.conditions("thief")["Accepted"] == ("False", "IdentityConflicted")
    before = [engine.service("seat") for engine in installation.engines()]
    assert installation.answers(elder) == ["ok"] * 2
    until(lambda: all(e.service("seat") > then for e, then in zip(installation.engines(), before, strict=True)))
    assert installation.answers(key_of("younger")) == ["invalid_api_key"] * 2

    installation.dismiss("elder", "thief")
    installation.wait_ready("younger")
    assert installation.answers(key_of("younger")) == ["ok"] * 2
    assert installation.answers(elder) == ["invalid_api_key"] * 2
    installation.dismiss("younger")


def test_bad_policy_says_what_is_wrong_where_and_the_others_go_on(installation: Installation) -> None:
    good = installation.admit("good")
    installation.cluster.apply(secret(installation.namespace, "weak-keys", one="guessable"))
    installation.apply("bad", identities=[api_key("weak-keys")])
    installation.apply("good", weight=7)
    installation.wait("Accepted=false", "bad")
    installation.wait_ready("good")
    [accepted] = (each for each in installation.policy("bad")["status"]["conditions"] if each["type"] == "Accepted")
    assert accepted["reason"] == "WeakKey"
    assert "spec.identities[0].apiKey.secretRef.name: " in accepted["message"]
    assert installation.enforced("good", "weight") == [7, 7]
    assert installation.answers(good) == ["ok"] * 2
    assert installation.answers("guessable") == ["invalid_api_key"] * 2
    installation.dismiss("good", "bad")


# ---- credentials


def test_key_is_rotated_without_a_gap(installation: Installation) -> None:
    old, new = installation.admit("rotating"), "the-next-key-of-rotating-0123456789"
    assert installation.answers(new) == ["invalid_api_key"] * 2
    installation.cluster.apply(secret(installation.namespace, "rotating-keys", one=old, two=new))
    until(lambda: installation.answers(new) == ["ok"] * 2)
    assert installation.answers(old) == ["ok"] * 2
    installation.cluster.apply(secret(installation.namespace, "rotating-keys", two=new))
    until(lambda: installation.answers(old) == ["invalid_api_key"] * 2)
    assert installation.answers(new) == ["ok"] * 2
    installation.dismiss("rotating")


def test_keys_and_tokens_are_good_while_the_api_server_is_away(installation: Installation) -> None:
    """A ServiceAccount's token comes from the API server, and is verified without it."""
    cluster, namespace = installation.cluster, installation.namespace
    key = installation.admit("steady")
    installation.admit("workload", identities=[service_account("default")])
    token = cluster.service_account_token(namespace, "default", audience="evenhand/inference/default")
    stray = cluster.service_account_token(namespace, "default", audience="another")
    engines = installation.engines()
    cluster.stop_api_server(grace=0)
    try:
        for engine in engines:
            assert (engine.answer(key), engine.answer(stray)) == ("ok", "invalid_api_key")
            before = engine.service("workload")
            assert engine.answer(token) == "ok"
            until(lambda: engine.service("workload") > before)  # noqa: B023  # reported within 100 ms of the answer
    finally:
        cluster.start_api_server()
    installation.admit("steady", weight=2)
    assert installation.enforced("steady", "weight") == [2, 2]
    installation.dismiss("steady", "workload")


# ---- faults


def test_pod_that_is_lost_is_shown_and_the_other_enforces(installation: Installation) -> None:
    lost, other = installation.engines()
    process = installation.pods.program(lost.name).pid
    os.kill(process, signal.SIGSTOP)
    try:
        installation.apply("late")
        until(lambda: installation.conditions("late")["Programmed"] == ("False", "PartiallyProgrammed"))
        until(lambda: [installation.rows()[each.name]["state"] for each in (lost, other)] == ["Unreachable", "Applied"])
        assert other.answer(key_of("late")) == "ok"
    finally:
        os.kill(process, signal.SIGCONT)
    installation.wait_ready("late")
    assert lost.answer(key_of("late")) == "ok"
    installation.dismiss("late")


def test_killed_operator_is_missed_by_no_client_and_replaced(installation: Installation) -> None:
    key = installation.admit("steady")
    before = installation.pool()["status"]["epoch"]
    os.kill(installation.operator_pid(), signal.SIGKILL)
    installation.apply("steady", weight=6)
    assert installation.answers(key) == ["ok"] * 2
    installation.wait_ready("steady")
    assert installation.enforced("steady", "weight") == [6, 6]
    until(lambda: installation.pool()["status"]["epoch"] > before)
    installation.dismiss("steady")


def test_engines_start_with_the_stored_config_and_are_pushed_to_again(installation: Installation) -> None:
    """One crashes, one is replaced and drains, while no operator is there."""
    key = installation.admit("steady", weight=3)
    crashed, replaced = installation.engines()
    boots = {engine.report()["bootId"] for engine in (crashed, replaced)}
    installation.wait_stored()
    installation.scale_operator(0)
    with replaced.stream(key, num_tokens=300) as running:
        installation.kubectl("delete", "pod", replaced.name, "--wait=false")
        os.kill(installation.pods.program(crashed.name).pid, signal.SIGKILL)
        assert last(running) == "length"
    until(lambda: len(restarted(installation, boots)) == 2, timeout=300)
    first, second = sorted(restarted(installation, boots), key=lambda engine: engine.name != crashed.name)
    assert first.report()["source"] in ("LastGood", "Bootstrap")
    assert second.report()["source"] == "Bootstrap", "it has no file of its own yet"
    assert installation.enforced("steady", "weight") == [3, 3]
    assert installation.answers(key) == ["ok"] * 2

    installation.scale_operator(1)
    installation.admit("steady", weight=5)
    assert installation.enforced("steady", "weight") == [5, 5]
    running = {engine.name: engine.report()["bootId"] for engine in (first, second)}
    until(lambda: {name: row["bootId"] for name, row in installation.rows().items()} == running)
    installation.dismiss("steady")


def restarted(installation: Installation, boots: set[str]) -> list[Engine]:
    """Engines in service whose process is none of these."""
    return [engine for engine in installation.engines() if engine.report()["bootId"] not in boots]


def test_no_credential_is_in_a_log(installation: Installation) -> None:
    installation.answers("guessable")
    until(lambda: "tenant=" in installation.logs())  # requests are logged
    logs = installation.logs()
    tenants = ("red", "batch", "chat", "leaver", "elder", "younger", "good", "rotating", "steady", "late")
    assert [each for each in ("guessable", "PRIVATE KEY", *map(key_of, tenants)) if each in logs] == []
