"""What an engine still has after a restart: the mounted document, its last good one."""

import asyncio
import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from evenhand_engine.frontend import config_store
from evenhand_policy.bootstrap import MANIFEST_FILE, pack, pack_manifest
from evenhand_policy.config import PoolReference, SchedulerConfig, TenantConfig
from evenhand_policy.push_document import encode_document
from evenhand_policy.push_protocol import (
    ConfigSource,
)
from evenhand_policy.version import Assignment, Version

from .conftest import CHAT, KEY, POOL, STRANGER, Engine, document


async def test_restarted_pod_has_its_last_good_config(engine: Engine) -> None:
    await engine.put(CHAT, 7, num_replicas=3)
    file = engine.folder / "state" / "last-good.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert os.listdir(file.parent) == ["last-good.json"]
    assert json.loads(file.read_bytes())["digest"] == engine.receiver.in_force.assignment.digest
    again = Engine(engine.folder)
    assert again.enforced == [(CHAT, 3)]
    assert again.receiver.in_force.source is ConfigSource.LAST_GOOD
    assert again.receiver.boot_id != engine.receiver.boot_id
    async with again:
        assert (await again.put(CHAT, 6))[0] == 409
        assert (await again.put(CHAT, 7, num_replicas=3))[0] == 200


async def test_what_the_engine_is_not_well_with_is_not_started_with_again(engine: Engine) -> None:
    """Else a document that it dies of would kill it at every start."""
    await engine.put(CHAT, 7)
    engine.ailment = "the core does not enforce it"
    status, report = await engine.put(document(tenants=()), 8)
    assert (status, report.ailment) == (200, "the core does not enforce it")
    assert Engine(engine.folder).version == (1, 7)
    engine.ailment = None
    async with asyncio.timeout(120):
        while Engine(engine.folder).version != (1, 8):
            await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    "damage", [lambda text: text[:-9], lambda text: text.replace(b'"document":"', b'"document":"AAAA'), lambda _: b""]
)
async def test_damaged_file_is_left_alone(engine: Engine, damage: Callable[[bytes], bytes]) -> None:
    await engine.put()
    file = engine.folder / "state" / "last-good.json"
    file.write_bytes(damage(file.read_bytes()))
    assert Engine(engine.folder).receiver.in_force.source is ConfigSource.BUILT_IN


async def test_pod_that_cannot_save_still_enforces(engine: Engine) -> None:
    (engine.folder / "state").write_text("a file where the folder should be")
    assert (await engine.put())[0] == 200
    assert engine.enforced[-1][0] == CHAT


def mount_bootstrap(folder: Path, revision: int, config: SchedulerConfig = CHAT, key: Ed25519PrivateKey = KEY) -> None:
    made = encode_document(config)
    files = pack_manifest(
        key,
        (KEY.public_key(),),
        cluster=config.cluster,
        pool=config.pool or POOL,
        assignment=Assignment(Version(1, revision), made.digest, 4),
        parts=pack(made),
    )
    for part in pack(made):
        files |= part
    for name, content in files.items():
        (folder / "bootstrap" / name).write_bytes(content)


async def test_new_pod_starts_with_the_mounted_document(tmp_path: Path) -> None:
    Engine(tmp_path)
    mount_bootstrap(tmp_path, 9)
    engine = Engine(tmp_path)
    assert engine.enforced == [(CHAT, 4)]
    assert engine.receiver.in_force.source is ConfigSource.BOOTSTRAP


@pytest.mark.parametrize(("mounted", "saved", "expected"), [(9, 7, 9), (7, 9, 9)])
async def test_newest_of_what_is_stored_is_enforced(engine: Engine, mounted: int, saved: int, expected: int) -> None:
    await engine.put(CHAT, saved)
    mount_bootstrap(engine.folder, mounted)
    assert Engine(engine.folder).version == (1, expected)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "part-0").unlink(),
        lambda folder: (folder / "part-0").write_bytes(b"of another document"),
        lambda folder: (folder / MANIFEST_FILE).unlink(),
        lambda folder: (folder / MANIFEST_FILE).write_bytes(b"a.b.c"),
        lambda folder: (folder / MANIFEST_FILE).write_bytes((folder / MANIFEST_FILE).read_bytes()[:-5] + b"AAAAA"),
    ],
)
async def test_incomplete_or_forged_set_is_not_loaded(tmp_path: Path, spoil: Callable[[Path], object]) -> None:
    Engine(tmp_path)
    mount_bootstrap(tmp_path, 9)
    spoil(tmp_path / "bootstrap")
    assert Engine(tmp_path).receiver.in_force.source is ConfigSource.BUILT_IN


async def test_pool_of_which_nothing_is_stored_yet_is_nothing_to_warn_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert Engine(tmp_path).receiver.in_force.source is ConfigSource.BUILT_IN
    assert caplog.records == []


async def test_volume_that_is_replaced_while_it_is_read_is_read_of_one_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Engine(tmp_path)
    folder = tmp_path / "bootstrap"
    for name, tenants in (("..old", 1), ("..new", 2)):
        mount_bootstrap(tmp_path, tenants, document(tenants=(TenantConfig(tenant_id=f"t{tenants}"),)))
        (folder / name).mkdir()
        for path in [path for path in folder.iterdir() if path.is_file()]:
            shutil.copy(path, folder / name / path.name)
    for path in [path for path in folder.iterdir() if path.is_file()]:
        path.unlink()
        path.symlink_to(f"..data/{path.name}")
    (folder / "..data").symlink_to("..old")
    read_file = config_store._read_file

    def replace_meanwhile(path: Path, limit: int) -> bytes:
        content = read_file(path, limit)
        if (folder / "..old").exists():
            (folder / "..moved").symlink_to("..new")
            (folder / "..moved").replace(folder / "..data")
            shutil.rmtree(folder / "..old")
        return content

    monkeypatch.setattr(config_store, "_read_file", replace_meanwhile)
    assert Engine(tmp_path).version == (1, 2)


async def test_set_signed_with_a_stranger_key_is_not_loaded(tmp_path: Path) -> None:
    Engine(tmp_path)
    mount_bootstrap(tmp_path, 9, key=STRANGER)
    assert Engine(tmp_path).receiver.in_force.source is ConfigSource.BUILT_IN


async def test_stored_config_of_another_pool_is_not_enforced(tmp_path: Path) -> None:
    Engine(tmp_path)
    mount_bootstrap(tmp_path, 9, document(pool=PoolReference(namespace="inference", name="other")))
    assert Engine(tmp_path).receiver.in_force.source is ConfigSource.BUILT_IN
