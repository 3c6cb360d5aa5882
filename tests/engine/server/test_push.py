"""`evenhand serve --pool`: what the operator pushes takes effect in the running server, at once and only if signed."""

import time
from pathlib import Path

import httpx2
import openai
import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from evenhand_engine.commands.cli import main
from evenhand_engine.frontend.push_receiver import PushSettings
from evenhand_engine.messages import Reconfigure
from evenhand_policy.bootstrap import KEYS_FILE
from evenhand_policy.config import PoolReference, SchedulerConfig, TenantConfig
from evenhand_policy.credentials import key_hash
from evenhand_policy.push_document import encode_document
from evenhand_policy.push_protocol import CONFIG_PATH, make_request, sign_request
from evenhand_policy.signatures import write_key_set
from evenhand_policy.version import Assignment, Version

from .conftest import Say, Serve, Server
from .policies import until

POOL = PoolReference(namespace="inference", name="default")
KEY = Ed25519PrivateKey.from_private_bytes(b"operator" * 4)
TENANT_KEY = "key-of-the-tenant-under-test"


@pytest.fixture
def push(tmp_path: Path) -> PushSettings:
    (tmp_path / "bootstrap").mkdir()
    (tmp_path / "bootstrap" / KEYS_FILE).write_bytes(write_key_set([KEY.public_key()]))
    return PushSettings(POOL, tmp_path / "bootstrap", last_good=tmp_path / "state" / "last-good.json")


def put(
    server: Server, revision: int, config: SchedulerConfig | None = None, key: Ed25519PrivateKey = KEY
) -> httpx2.Response:
    document = encode_document(config or CONFIG)
    assignment = Assignment(Version(1, revision), document.digest, 3)
    request = make_request("PUT", "", time.time(), cluster="c1", pool=POOL, assignment=assignment)
    return httpx2.put(
        f"{server.admin_url}{CONFIG_PATH}", content=document.compressed, headers=sign_request(key, request)
    )


CONFIG = SchedulerConfig(
    cluster="c1", pool=POOL, tenants=(TenantConfig(tenant_id="chat", weight=4, key_hashes=(key_hash(TENANT_KEY),)),)
)


def test_a_push_takes_effect_in_the_door_and_in_the_engine(serve: Serve, say: Say, push: PushSettings) -> None:
    server = serve(say("Hello"), push=push)
    assert server.core.expect(Reconfigure).config.tenants == ()
    answer = put(server, 1)
    assert (answer.status_code, answer.json()["revision"]) == (200, 1)
    reconfigure = server.core.expect(Reconfigure)
    assert (reconfigure.config, reconfigure.num_replicas) == (CONFIG, 3)
    with pytest.raises(openai.AuthenticationError):
        server.client(api_key="nobody-knows-this-key").completions.create(model="tiny", prompt="Hi")
    client = server.client(api_key=TENANT_KEY)
    assert client.completions.create(model="tiny", prompt="Hi").choices[0].text == "Hello"
    shown = httpx2.get(f"{server.admin_url}/v1/scheduler-config").json()
    assert (shown["source"], shown["epoch"], shown["revision"]) == ("Push", 1, 1)


def test_what_was_pushed_is_enforced_again_after_a_restart(serve: Serve, say: Say, push: PushSettings) -> None:
    server = serve(say("Hello"), push=push)
    server.core.tells_config = True
    assert put(server, 7).status_code == 200
    until(lambda: push.last_good is not None and push.last_good.exists(), "the last good config is kept")
    restarted = serve(say("Hello"), push=push)
    stored = httpx2.get(f"{restarted.admin_url}/v1/scheduler-config").json()
    assert (stored["revision"], stored["source"]) == (7, "LastGood")
    assert httpx2.get(f"{restarted.url}/ready").status_code == 200
    assert put(restarted, 6).status_code == 409
    assert put(restarted, 8).status_code == 200
    assert httpx2.get(f"{restarted.admin_url}/v1/scheduler-config").json()["source"] == "Push"


def test_engine_is_ill_until_its_core_enforces_what_was_pushed(serve: Serve, say: Say, push: PushSettings) -> None:
    """The core says so within a step; a core that died of the config never does."""
    server = serve(say("Hello"), push=push)
    assert "does not enforce" in put(server, 1).json()["ailment"]
    assert push.last_good is not None and not push.last_good.exists()
    server.core.tells_config = True
    put(server, 2, SchedulerConfig(cluster="c1", pool=POOL))
    until(lambda: not put(server, 2, SchedulerConfig(cluster="c1", pool=POOL)).json()["ailment"], "no ailment is left")


def test_nobody_is_served_before_there_is_a_config(serve: Serve, say: Say, push: PushSettings) -> None:
    server = serve(say("Hello"), push=push)
    answer = httpx2.get(f"{server.url}/v1/models", headers={"Authorization": "Bearer anything-at-all"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_configured")
    assert "Retry-After" in answer.headers
    ready = httpx2.get(f"{server.url}/ready")
    assert (ready.status_code, ready.json()["error"]["code"]) == (503, "not_configured")
    assert httpx2.get(f"{server.url}/health").status_code == 200, "it is not to be restarted"
    put(server, 1)
    assert httpx2.get(f"{server.url}/ready").status_code == 200
    assert httpx2.get(f"{server.url}/v1/models", headers={"Authorization": "Bearer x"}).status_code == 401


def test_a_push_is_in_force_in_every_process_once_the_report_is_well(
    serve: Serve, say: Say, push: PushSettings
) -> None:
    server = serve(say("Hello"), push=push, api_server_count=2)
    server.core.tells_config = True

    def models(key: str) -> set[int]:
        """What connections of their own, divided between the processes, are answered."""
        headers = {"Authorization": f"Bearer {key}"}
        return {httpx2.get(f"{server.url}/v1/models", headers=headers).status_code for _ in range(8)}

    assert models(TENANT_KEY) == {503}
    put(server, 1)
    until(lambda: not put(server, 1).json()["ailment"], "no ailment is left")
    assert (models(TENANT_KEY), models("nobody-knows-this-key")) == ({200}, {401})
    another = TenantConfig(tenant_id="chat", key_hashes=(key_hash("another-key-of-the-tenant"),))
    changed = SchedulerConfig(cluster="c1", pool=POOL, tenants=(another,))
    until(lambda: not put(server, 2, changed).json()["ailment"], "no ailment is left")
    assert models(TENANT_KEY) == {401}


def test_engine_may_be_told_to_serve_without_a_config(serve: Serve, say: Say, push: PushSettings) -> None:
    server = serve(say("Hello"), push=push, allow_unconfigured=True)
    assert httpx2.get(f"{server.url}/ready").status_code == 200
    assert httpx2.get(f"{server.url}/v1/models").status_code == 200


def test_an_unsigned_or_wrongly_signed_push_changes_nothing(serve: Serve, say: Say, push: PushSettings) -> None:
    server = serve(say("Hello"), push=push)
    assert put(server, 1, key=Ed25519PrivateKey.generate()).status_code == 401
    document = encode_document(CONFIG).compressed
    assert httpx2.put(f"{server.admin_url}{CONFIG_PATH}", content=document).status_code == 401
    shown = httpx2.get(f"{server.admin_url}/v1/scheduler-config").json()
    assert (shown["source"], shown["revision"]) == ("BuiltIn", 0)


def test_without_a_pool_nothing_can_be_pushed(serve: Serve, say: Say) -> None:
    server = serve(say("Hello"))
    assert put(server, 1).status_code == 405


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--pool", "a/b", "--bootstrap", "k", "--policies", "p"], "exclude each other"),
        (["--pool", "a/b"], "--pool needs --bootstrap"),
        (["--pool", "a", "--bootstrap", "k"], "not NAMESPACE/NAME"),
        (["--bootstrap", "k"], "means nothing without --pool"),
        (["--allow-unconfigured"], "means nothing without --pool"),
    ],
)
def test_options_that_contradict_each_other_are_refused(flags: list[str], complaint: str) -> None:
    result = CliRunner().invoke(main, ["serve", *flags])
    assert result.exit_code == 2
    assert complaint in " ".join(result.output.split())
