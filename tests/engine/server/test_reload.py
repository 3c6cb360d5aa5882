"""Policies that change while the server runs."""

import os
from pathlib import Path

import httpx2
import openai
import pytest

from evenhand_engine.errors import StartupError
from evenhand_engine.messages import (
    AddRequest,
    Reconfigure,
)

from .conftest import Say, Serve
from .policies import BATCH_KEY, CHAT_KEY, admin, complete, pending, policy, samples, until, write, write_two


@pytest.fixture
def policies(tmp_path: Path) -> Path:
    return write_two(tmp_path)


def test_reload_is_live_and_loses_no_request(serve: Serve, policies: Path) -> None:
    server = serve(policies=policies)
    before = admin(server, "/v1/scheduler-config")
    assert before["source"] == "Files"
    server.core.expect(Reconfigure)
    with pending(server, CHAT_KEY, 1):
        write(policies, "chat", policy("chat", "another-key-0123456789-0123456789", weight=9))
        config = server.core.expect(Reconfigure).config
        assert {t.tenant_id: t.weight for t in config.tenants} == {"batch": 1, "chat": 9}
        with pytest.raises(openai.AuthenticationError):
            complete(server, CHAT_KEY)
    after = admin(server, "/v1/scheduler-config")
    assert after["digest"] == config.digest() != before["digest"]
    assert [t["weight"] for t in after["config"]["tenants"]] == [1, 9]
    assert samples(server)["evenhand_config_reloads_total{result=applied}"] == 1


def test_a_key_is_rotated_without_a_gap(serve: Serve, say: Say, policies: Path) -> None:
    """Both are good for a while, then only the new one."""
    server, new_key = serve(say("ok"), policies=policies), "the-next-key-0123456789-0123456789"
    secret, chat = policy("chat", CHAT_KEY)

    def keys_of_chat() -> int:
        tenants = admin(server, "/v1/scheduler-config")["config"]["tenants"]
        return sum(len(each["keyHashes"]) for each in tenants if each["tenantId"] == "chat")

    write(policies, "chat", [secret | {"stringData": {"current": CHAT_KEY, "next": new_key}}, chat])
    until(lambda: keys_of_chat() == 2, "the new key is known")
    for key in (CHAT_KEY, new_key):
        complete(server, key)
        assert server.core.expect(AddRequest).tenant_id == "chat"
    write(policies, "chat", [secret | {"stringData": {"next": new_key}}, chat])
    until(lambda: keys_of_chat() == 1, "the old key is gone")
    complete(server, new_key)
    with pytest.raises(openai.AuthenticationError):
        complete(server, CHAT_KEY)


def test_a_bad_file_keeps_the_last_good_config_and_says_so(
    serve: Serve, say: Say, policies: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = serve(say("ok"), policies=policies)
    good = admin(server, "/v1/scheduler-config")
    write(policies, "batch", [{"kind": "TenantPolicy", "apiVersion": "evenhand.dev/v1alpha1", "spec": {"weight": -1}}])
    until(lambda: admin(server, "/v1/scheduler-config")["error"] is not None, "the rejection is shown")
    state = admin(server, "/v1/scheduler-config")
    assert state["digest"] == good["digest"]
    assert "batch.yaml" in state["error"]
    assert state["rejectedAt"] > state["appliedAt"]
    metrics = samples(server)
    assert metrics["evenhand_config_current{}"] == 0
    assert metrics["evenhand_config_reloads_total{result=rejected}"] >= 1, "each time that it is looked at"
    assert any("config rejected" in record.message for record in caplog.records)
    complete(server, BATCH_KEY)
    write(policies, "batch", policy("batch", BATCH_KEY, latencyClass="Batch"))
    until(lambda: admin(server, "/v1/scheduler-config")["error"] is None, "the repair is noticed")
    assert samples(server)["evenhand_config_current{}"] == 1


def test_configmap_links_are_followed(serve: Serve, say: Say, tmp_path: Path) -> None:
    """The kubelet writes a new folder and moves the link `..data` to it."""
    directory = tmp_path / "mount"
    for version, key in (("..one", CHAT_KEY), ("..two", BATCH_KEY)):
        (directory / version).mkdir(parents=True)
        write(directory / version, "chat", policy("chat", key))
    (directory / "..data").symlink_to("..one")
    (directory / "chat.yaml").symlink_to("..data/chat.yaml")
    server = serve(say("ok"), policies=directory)
    complete(server, CHAT_KEY)
    server.core.expect(Reconfigure)
    (directory / "..next").symlink_to("..two")
    os.replace(directory / "..next", directory / "..data")
    server.core.expect(Reconfigure)
    complete(server, BATCH_KEY)


def test_the_directory_may_be_replaced_as_a_whole(serve: Serve, say: Say, policies: Path) -> None:
    server = serve(say("ok"), policies=policies)
    server.core.expect(Reconfigure)
    for weight in (7, 8):
        fresh = policies.with_name("fresh")
        fresh.mkdir()
        write(fresh, "chat", policy("chat", CHAT_KEY, weight=weight))
        policies.rename(policies.with_name(f"old-{weight}"))
        fresh.rename(policies)
        while [t.weight for t in server.core.expect(Reconfigure).config.tenants] != [weight]:
            pass  # a moment without the directory may have been seen


def test_bad_policies_at_start_are_a_start_up_error(serve: Serve, say: Say, policies: Path) -> None:
    (policies / "bad.yaml").write_text("kind: TenantPolicy\n  weight: [")
    with pytest.raises(StartupError, match=r"bad\.yaml"):
        serve(say("ok"), policies=policies)
    with pytest.raises(StartupError, match="missing"):
        serve(say("ok"), policies=policies / "missing")


def test_no_key_is_shown_anywhere(serve: Serve, say: Say, policies: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    server = serve(say("ok"), policies=policies, api_key="a-shared-secret")
    complete(server, CHAT_KEY, prompt="a private prompt")
    with pytest.raises(openai.AuthenticationError):
        complete(server, "a-mistyped-secret")
    write(policies, "chat", policy("chat", CHAT_KEY, weight=5000))
    until(lambda: admin(server, "/v1/scheduler-config")["error"] is not None, "the rejection is shown")
    pages = [httpx2.get(server.admin_url + path).text for path in ("/metrics", "/v1/tenants", "/v1/scheduler-config")]
    ours = [r for r in caplog.records if r.name.startswith(("evenhand", "aiohttp"))]
    shown = "\n".join([*pages, *(f"{r.getMessage()} {getattr(r, 'fields', '')}" for r in ours)])
    assert "request" in shown
    for secret in (CHAT_KEY, BATCH_KEY, "a-shared-secret", "a-mistyped-secret", "a private prompt"):
        assert secret not in shown
