"""Who leads: against an API of one object that compares and swaps as the real one does (e2e uses that one)."""

import asyncio
import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest

from evenhand_operator.clock import SYSTEM_CLOCK
from evenhand_operator.kube import ApiError
from evenhand_operator.lease import EPOCH_ANNOTATION, Lease, LeaseLostError
from evenhand_operator.settings import Settings
from harness.virtual_time import VirtualTime

Json = dict[str, Any]


class OneLease:
    """The part of KubeClient that a Lease uses. `fail` is asked before every request and may raise; with `hang` none is
    answered."""

    def __init__(self) -> None:
        self.stored: Json | None = None
        self.version = 0
        self.fail: Callable[[str], None] = lambda method: None
        self.lose_answers = False
        self.hang = False

    async def get(self, *_: object) -> Json:
        await self._arrive("get")
        if self.stored is None:
            raise ApiError(404, "not found")
        return copy.deepcopy(self.stored)

    async def create(self, _: object, obj: Json) -> Json:
        await self._arrive("create")
        if self.stored is not None:
            raise ApiError(409, "already exists")
        return self._store(obj)

    async def replace(self, _: object, obj: Json) -> Json:
        await self._arrive("replace")
        if self.stored is None:
            raise ApiError(404, "not found")
        if obj["metadata"]["resourceVersion"] != self.stored["metadata"]["resourceVersion"]:
            raise ApiError(409, "the object has been modified")
        return self._store(obj)

    async def _arrive(self, method: str) -> None:
        await asyncio.sleep(3600 if self.hang else 0)  # others may come in between
        self.fail(method)

    def _store(self, obj: Json) -> Json:
        self.version += 1
        self.stored = copy.deepcopy(obj)
        self.stored["metadata"]["resourceVersion"] = str(self.version)
        if self.lose_answers:
            raise ApiError(0, "the answer was lost")
        return copy.deepcopy(self.stored)

    @property
    def holder(self) -> str:
        assert self.stored is not None
        return str(self.stored["spec"]["holderIdentity"])

    @property
    def epoch(self) -> str:
        assert self.stored is not None
        return str(self.stored["metadata"]["annotations"][EPOCH_ANNOTATION])


@pytest.fixture
def api() -> OneLease:
    return OneLease()


def lease(api: OneLease, identity: str, *, least_epoch: int = 0, time: VirtualTime | None = None, **own: Any) -> Lease:
    settings = Settings(identity=identity, **own)
    clock = time.clock if time is not None else SYSTEM_CLOCK
    return Lease(api, "n", settings, lambda: least_epoch, clock)  # type: ignore[arg-type]


async def test_first_replica_leads_at_once(api: OneLease) -> None:
    first = lease(api, "first")
    await first.acquire()
    assert (api.holder, api.epoch, first.epoch) == ("first", "1", 1)
    await first.confirm()
    assert api.version == 2


@pytest.mark.parametrize("silent_for", [3, 30])
def test_second_one_waits_until_the_first_is_silent(virtual_time: VirtualTime, api: OneLease, silent_for: int) -> None:
    """However long that one has lived: what counts is for how long the Lease is seen unchanged."""

    async def scenario() -> float:
        first, second = lease(api, "first", time=virtual_time), lease(api, "second", time=virtual_time)
        await first.acquire()
        waiting = asyncio.create_task(second.acquire())
        holding = asyncio.create_task(first.hold())
        await asyncio.sleep(silent_for)
        assert not waiting.done()
        holding.cancel()
        await waiting
        return asyncio.get_running_loop().time()

    renew, lease_seconds = Settings().renew_seconds, Settings().lease_seconds
    waited = virtual_time.run(scenario()) - silent_for
    assert lease_seconds - renew <= waited < lease_seconds + renew
    assert (api.holder, api.epoch) == ("second", "2")


async def test_released_lease_is_taken_at_once(api: OneLease) -> None:
    first, second = lease(api, "first"), lease(api, "second", lease_seconds=60)
    await first.acquire()
    await first.release()
    await second.acquire()
    assert (api.holder, api.epoch) == ("second", "2")
    assert api.stored is not None
    assert api.stored["spec"]["leaseTransitions"] == 1
    with pytest.raises(LeaseLostError):
        await first.confirm()
    await first.release()
    assert api.holder == "second"


def test_of_many_one_leads_and_epochs_are_never_given_twice(virtual_time: VirtualTime, api: OneLease) -> None:
    """Each leads for one renewal, then falls silent without giving the lease back."""
    epochs: list[int] = []

    async def live(replica: Lease) -> None:
        await replica.acquire()
        epochs.append(replica.epoch)
        with contextlib.suppress(LeaseLostError, ApiError):
            epochs.append(await replica.raise_epoch(0))

    async def scenario() -> None:
        await asyncio.gather(*(live(lease(api, f"r{index}", time=virtual_time)) for index in range(8)))

    virtual_time.run(scenario())
    assert len(epochs) == len(set(epochs)) >= 8
    assert epochs == sorted(epochs)


def test_replaced_leader_cannot_raise_the_epoch(virtual_time: VirtualTime, api: OneLease) -> None:
    async def scenario() -> None:
        first, second = lease(api, "first", time=virtual_time), lease(api, "second", time=virtual_time)
        await first.acquire()
        await second.acquire()
        with pytest.raises(LeaseLostError, match="another replica holds"):
            await first.raise_epoch(99)

    virtual_time.run(scenario())
    assert (api.holder, api.epoch) == ("second", "2")


def test_leader_that_cannot_renew_stops_before_another_one_may_lead(virtual_time: VirtualTime, api: OneLease) -> None:
    def away(method: str) -> None:
        raise ApiError(0, "connection refused")

    async def scenario() -> float:
        first = lease(api, "first", time=virtual_time)
        await first.acquire()
        await asyncio.sleep(1)
        api.fail = away
        with pytest.raises(LeaseLostError, match="in time"):
            await first.hold()
        return asyncio.get_running_loop().time()

    settings = Settings()
    assert virtual_time.run(scenario()) == settings.renew_deadline_seconds < settings.lease_seconds


def test_leader_whose_renewal_is_not_answered_stops_as_soon(virtual_time: VirtualTime, api: OneLease) -> None:
    async def scenario() -> float:
        first = lease(api, "first", time=virtual_time)
        await first.acquire()
        api.hang = True
        with pytest.raises(LeaseLostError, match="in time"):
            await first.hold()
        return asyncio.get_running_loop().time()

    assert virtual_time.run(scenario()) == Settings().renew_deadline_seconds


def test_leader_rides_out_what_is_shorter(virtual_time: VirtualTime, api: OneLease) -> None:
    async def scenario() -> None:
        first = lease(api, "first", time=virtual_time)
        await first.acquire()
        back_at = asyncio.get_running_loop().time() + 6

        def away(method: str) -> None:
            if asyncio.get_running_loop().time() < back_at:
                raise ApiError(503, "apiserver is shutting down")

        api.fail = away
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(20):
                await first.hold()

    virtual_time.run(scenario())
    assert api.holder == "first"


async def test_renewal_whose_answer_was_lost_is_no_loss(api: OneLease) -> None:
    first = lease(api, "first")
    await first.acquire()
    api.lose_answers = True
    with pytest.raises(ApiError):
        await first._write(first.epoch)
    api.lose_answers = False
    await first.confirm()
    assert (api.holder, api.epoch) == ("first", "1")


async def test_lease_that_was_written_to_by_others_is_kept(api: OneLease) -> None:
    first = lease(api, "first")
    await first.acquire()
    assert api.stored is not None
    api.stored["metadata"]["labels"] = {"touched": "yes"}
    api.stored["metadata"]["resourceVersion"] = "77"
    await first.confirm()
    assert api.stored["metadata"]["labels"] == {"touched": "yes"}
    assert api.holder == "first"


async def test_deleted_lease_rolls_nothing_back(api: OneLease) -> None:
    first = lease(api, "first")
    await first.acquire()
    await first.raise_epoch(40)
    api.stored = None
    await first.confirm()
    assert (api.holder, api.epoch) == ("first", "40")
    api.stored = None
    second = lease(api, "second", least_epoch=40)  # by the status of the pools
    await second.acquire()
    assert second.epoch == 41
    with pytest.raises(LeaseLostError):
        await first.confirm()


def test_deleted_lease_that_cannot_be_made_again_at_once_is_not_lost_yet(
    virtual_time: VirtualTime, api: OneLease
) -> None:
    async def scenario() -> None:
        first = lease(api, "first", time=virtual_time)
        await first.acquire()
        api.stored, failures = None, [ApiError(0, "no answer"), ApiError(403, "not yet")]

        def be_away(method: str) -> None:
            if method == "create" and failures:
                raise failures.pop()

        api.fail = be_away
        await first.confirm()
        assert (api.holder, api.epoch, failures) == ("first", "1", [])

    virtual_time.run(scenario())


@pytest.mark.parametrize("text", ["", "x", "-3", "²", "1e9"])
async def test_epoch_that_is_no_number_counts_for_nothing(api: OneLease, text: str) -> None:
    """Somebody edited the Lease: what pods and pools tell of still holds."""
    first = lease(api, "first")
    await first.acquire()
    await first.release()
    assert api.stored is not None
    api.stored["metadata"]["annotations"][EPOCH_ANNOTATION] = text
    second = lease(api, "second", least_epoch=7)
    await second.acquire()
    assert second.epoch == 8


async def test_epoch_is_at_least_what_was_seen(api: OneLease) -> None:
    first = lease(api, "first")
    await first.acquire()
    assert await first.raise_epoch(17) == 17
    assert await first.raise_epoch(3) == 18
    assert api.epoch == "18"
