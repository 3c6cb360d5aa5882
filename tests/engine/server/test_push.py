"""`evenhand serve --pool`: what the operator pushes takes effect in the running server, at once and only if signed."""

import time
from pathlib import Path

import httpx2
import openai
import pytest
from click.testing import CliRunner

from evenhand_engine.commands.cli import main
from evenhand_engine.frontend.push_receiver import PushSettings
from evenhand_engine.messages import Reconfigure
from evenhand_policy.config import PoolReference, SchedulerConfig, TenantConfig
from evenhand_policy.credentials import key_hash
from evenhand_policy.push_protocol import CONFIG_PATH, body_digest, sign_request

from .conftest import Say, Serve, Server

POOL = PoolReference(namespace="inference", name="default")
PUSH_KEY = b"push-key-of-the-pool-under-test"
TENANT_KEY = "key-of-the-tenant-under-test"


@pytest.fixture
def push(tmp_path: Path) -> PushSettings:
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "current").write_bytes(PUSH_KEY)
    return PushSettings(POOL, tmp_path / "keys", last_good=tmp_path / "state" / "last-good.json")


def put(server: Server, config: SchedulerConfig, key: bytes = PUSH_KEY) -> httpx2.Response:
    document = config.canonical_json()
    headers = sign_request(key, "PUT", time.time(), num_replicas=3, digest=body_digest(document))
    return httpx2.put(f"{server.admin_url}{CONFIG_PATH}", content=document, headers=headers)


def config(revision: int) -> SchedulerConfig:
    tenant = TenantConfig(tenant_id="chat", weight=4, key_hashes=(key_hash(TENANT_KEY),))
    return SchedulerConfig(cluster="c1", pool=POOL, epoch=1, revision=revision, tenants=(tenant,))


def test_a_push_takes_effect_in_the_door_and_in_the_engine(serve: Serve, say: Say, push: PushSettings) -> None:
    server = serve(say("Hello"), push=push)
    assert server.core.expect(Reconfigure).config.tenants == ()
    answer = put(server, config(1))
    assert (answer.status_code, answer.json()["revision"]) == (200, 1)
    reconfigure = server.core.expect(Reconfigure)
    assert (reconfigure.config, reconfigure.num_replicas) == (config(1), 3)
    with pytest.raises(openai.AuthenticationError):
        server.client(api_key="nobody-knows-this-key").completions.create(model="tiny", prompt="Hi")
    client = server.client(api_key=TENANT_KEY)
    assert client.completions.create(model="tiny", prompt="Hi").choices[0].text == "Hello"
    assert httpx2.get(f"{server.admin_url}/v1/scheduler-config").json()["source"] == "Push"


def test_what_was_pushed_is_enforced_again_after_a_restart(serve: Serve, say: Say, push: PushSettings) -> None:
    assert put(serve(say("Hello"), push=push), config(7)).status_code == 200
    restarted = serve(say("Hello"), push=push)
    stored = httpx2.get(f"{restarted.admin_url}/v1/scheduler-config").json()
    assert (stored["config"]["revision"], stored["source"]) == (7, "LastGood")
    assert put(restarted, config(6)).status_code == 409
    assert put(restarted, config(8)).status_code == 200
    assert httpx2.get(f"{restarted.admin_url}/v1/scheduler-config").json()["source"] == "Push"


def test_an_unsigned_or_wrongly_signed_push_changes_nothing(serve: Serve, say: Say, push: PushSettings) -> None:
    server = serve(say("Hello"), push=push)
    assert put(server, config(1), key=b"another-key-that-nobody-knows").status_code == 401
    assert httpx2.put(f"{server.admin_url}{CONFIG_PATH}", content=config(1).canonical_json()).status_code == 401
    assert httpx2.get(f"{server.admin_url}/v1/scheduler-config").json()["config"]["revision"] == 0


def test_without_a_pool_nothing_can_be_pushed(serve: Serve, say: Say) -> None:
    server = serve(say("Hello"))
    assert put(server, config(1)).status_code == 405


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--pool", "a/b", "--push-keys", "k", "--policies", "p"], "exclude each other"),
        (["--pool", "a/b"], "--pool needs --push-keys"),
        (["--pool", "a", "--push-keys", "k"], "not NAMESPACE/NAME"),
        (["--push-keys", "k"], "means nothing without --pool"),
    ],
)
def test_options_that_contradict_each_other_are_refused(flags: list[str], complaint: str) -> None:
    result = CliRunner().invoke(main, ["serve", *flags])
    assert result.exit_code == 2
    assert complaint in " ".join(result.output.split())
