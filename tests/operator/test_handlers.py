"""Kopf as a watcher: it is fed from, started anew where it ends, and told to look elsewhere where namespaces change."""

import asyncio
from typing import Any

import kopf
import pytest

from evenhand_operator import handlers
from evenhand_operator.cache import Cache
from evenhand_operator.handlers import watch
from evenhand_operator.settings import Settings
from harness.builders import Notices

CREDENTIALS = kopf.ConnectionInfo(server="https://127.0.0.1")


class Kopf:
    """Stands for `kopf.operator`: each start ends with what is next in `ends`, and then only when it is told to stop."""

    def __init__(self) -> None:
        self.starts: list[dict[str, Any]] = []
        self.ends: list[Exception | None] = []

    async def operator(self, **given: Any) -> None:
        self.starts.append(given)
        if self.ends:
            if (error := self.ends.pop(0)) is not None:
                raise error
            return
        await asyncio.to_thread(given["stop_flag"].wait)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Kopf:
    stand_in = Kopf()
    monkeypatch.setattr(kopf, "operator", stand_in.operator)
    monkeypatch.setattr(handlers, "_FIRST_PAUSE_SECONDS", 0.005)
    monkeypatch.setattr(handlers, "_LOOK_SECONDS", 0.005)
    return stand_in


async def cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task], timeout=120)
    assert task.cancelled()


@pytest.mark.parametrize(
    "error", [kopf.TemporaryError("410 Gone: the provided continue parameter is too old"), RuntimeError("403"), None]
)
async def test_kopf_that_ends_is_started_anew(started: Kopf, changes: Any, error: Exception | None) -> None:
    """A list whose pages expired ends it, and so does a namespace that was deleted; the process goes on."""
    started.ends = [error, error]
    task = asyncio.create_task(watch(Cache(Notices()), Settings(), lambda: (), lambda: CREDENTIALS))
    await changes.until(lambda: len(started.starts) == 3)
    assert not task.done()
    assert {each["clusterwide"] for each in started.starts} == {True}
    await cancel(task)
    assert started.starts[-1]["stop_flag"].is_set(), "its thread ends with us"


def test_what_takes_a_cancellation_for_a_pause_ends_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a watch of Kopf's that is being connected while Kopf ends; it is cancelled once, and waited for."""
    monkeypatch.setattr(handlers, "_GRACE_SECONDS", 0.0)
    swallowed: list[None] = []

    async def go_on() -> None:
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                if len(swallowed) == 3:
                    raise
                swallowed.append(None)

    async def kopf_that_ends() -> None:
        ending = asyncio.Event()
        reaper = asyncio.create_task(handlers._reap(ending, asyncio.current_task()))
        watching = asyncio.create_task(go_on())
        await asyncio.sleep(0)
        watching.cancel()
        ending.set()
        await asyncio.wait([watching], timeout=120)
        assert watching.cancelled()
        reaper.cancel()

    asyncio.run(kopf_that_ends())
    assert len(swallowed) == 3


async def test_namespaces_that_cannot_be_read_are_left_out_until_they_can(started: Kopf, changes: Any) -> None:
    readable: tuple[str, ...] = ("a", "b")
    looks = 0

    def look() -> tuple[str, ...]:
        nonlocal looks
        looks += 1
        return readable

    task = asyncio.create_task(watch(Cache(Notices()), Settings(namespaces=("a", "b")), look, lambda: CREDENTIALS))
    await changes.until(lambda: len(started.starts) == 1)
    readable = ("a",)
    await changes.until(lambda: len(started.starts) == 2)
    assert [each["namespaces"] for each in started.starts] == [("a", "b"), ("a",)]
    assert not any(each["clusterwide"] for each in started.starts)
    readable = ()
    await changes.until(lambda: started.starts[-1]["stop_flag"].is_set())
    looked = looks
    await changes.until(lambda: looks > looked + 2)
    assert len(started.starts) == 2, "without namespaces it would watch all of them"
    readable = ("b",)
    await changes.until(lambda: len(started.starts) == 3)
    await cancel(task)


async def test_it_asks_with_credentials_that_were_read_again(started: Kopf, changes: Any) -> None:
    """Even where they look the same: a file that they name may hold another authority."""
    known = CREDENTIALS
    task = asyncio.create_task(watch(Cache(Notices()), Settings(), lambda: (), lambda: known))
    await changes.until(lambda: len(started.starts) == 1)
    known = kopf.ConnectionInfo(server="https://127.0.0.1")
    await changes.until(lambda: len(started.starts) == 2)
    assert started.starts[0]["stop_flag"].is_set()
    await cancel(task)


async def test_only_policies_and_pools_are_watched_and_nothing_is_written(started: Kopf, changes: Any) -> None:
    task = asyncio.create_task(watch(Cache(Notices()), Settings(), lambda: (), lambda: CREDENTIALS))
    await changes.until(lambda: len(started.starts) == 1)
    given = started.starts[0]
    watched = [
        handler.selector.any_name or handler.selector.plural for handler in given["registry"]._watching._handlers
    ]
    assert sorted(map(str, watched)) == ["enginepools", "tenantpolicies"]
    assert given["settings"].posting.enabled is False and given["standalone"] is True
    assert [handler.activity for handler in given["registry"]._activities._handlers] == ["authentication", "cleanup"]
    await cancel(task)
