"""The operator's key: made once, rotated in time, and the same for every leader."""

import copy
from typing import Any

import pytest

from evenhand_operator.clock import Clock
from evenhand_operator.kube import ApiError
from evenhand_operator.signing_key import SigningKey

Json = dict[str, Any]
DAY = 86400.0


class Api:
    """The part of KubeClient that is used; what somebody else writes in between is in `meanwhile`."""

    def __init__(self) -> None:
        self.secret: Json | None = None
        self.writes = 0
        self.meanwhile: Json | None = None

    async def get(self, _: object, namespace: str, name: str) -> Json:
        assert (namespace, name) == ("evenhand-system", "evenhand-signing-key")
        if self.secret is None:
            raise ApiError(404, "not found")
        return copy.deepcopy(self.secret)

    async def create(self, _: object, obj: Json) -> Json:
        if self.meanwhile or self.secret:
            self.secret = self.meanwhile or self.secret
            raise ApiError(409, "exists")
        return self._store(obj)

    async def replace(self, _: object, obj: Json) -> Json:
        assert self.secret
        if obj["metadata"]["resourceVersion"] != self.secret["metadata"]["resourceVersion"]:
            raise ApiError(409, "changed")
        return self._store(obj)

    def _store(self, obj: Json) -> Json:
        self.writes += 1
        self.secret = copy.deepcopy(obj)
        self.secret["metadata"]["resourceVersion"] = str(self.writes)
        return copy.deepcopy(self.secret)


@pytest.fixture
def api() -> Api:
    return Api()


def signing_key(api: Api, now: float = 1_800_000_000.0) -> SigningKey:
    return SigningKey(api, "evenhand-system", 30 * DAY, Clock(wall=lambda: now))  # type: ignore[arg-type]


def public(key: SigningKey) -> list[bytes]:
    return [each.public_bytes_raw() for each in key.trusted]


async def test_first_leader_makes_the_key_and_the_next_has_the_same(api: Api) -> None:
    first, second = signing_key(api), signing_key(api)
    assert await first.refresh()
    assert await second.refresh()
    assert public(first) == public(second)
    assert first.current.public_key().public_bytes_raw() == public(first)[0]
    assert not await first.refresh()
    assert api.writes == 1


async def test_of_two_that_make_it_at_once_one_does(api: Api) -> None:
    other = Api()
    await signing_key(other).refresh()
    api.meanwhile = other.secret
    late = signing_key(api)
    with pytest.raises(ApiError):
        await late.refresh()
    await late.refresh()
    winner = signing_key(other)
    await winner.refresh()
    assert public(late) == public(winner)


async def test_key_is_rotated_to_one_that_pods_know_already(api: Api) -> None:
    now = 1_800_000_000.0
    key = signing_key(api, now)
    await key.refresh()
    current, upcoming = public(key)
    assert not await signing_key_at(api, key, now + 29 * DAY)
    assert await signing_key_at(api, key, now + 31 * DAY)
    assert public(key)[0] == upcoming, "which was published 30 days ago"
    assert public(key)[2] == current, "by which what is stored is signed"
    assert key.current.public_key().public_bytes_raw() == upcoming
    newest = public(key)[1]
    assert newest not in (current, upcoming)
    assert not await signing_key_at(api, key, now + 60 * DAY)
    assert await signing_key_at(api, key, now + 62 * DAY)
    assert (public(key)[0], public(key)[2]) == (newest, upcoming)
    assert current not in public(key), "it is forgotten"


async def signing_key_at(api: Api, key: SigningKey, now: float) -> bool:
    key._clock = Clock(wall=lambda: now)
    return await key.refresh()


@pytest.mark.parametrize("data", [{}, {"current.pem": "AAAA"}, {"current.pem": "!", "next.pem": "!"}])
async def test_what_is_no_key_is_replaced(api: Api, data: Json) -> None:
    key = signing_key(api)
    await key.refresh()
    assert api.secret
    before, api.secret["data"] = public(key), data
    assert await key.refresh()
    assert len(public(key)) == 2
    assert not set(before) & set(public(key))


async def test_deleted_key_is_made_anew(api: Api) -> None:
    key = signing_key(api)
    await key.refresh()
    before, api.secret = public(key), None
    assert await key.refresh()
    assert not set(before) & set(public(key))


async def test_private_halves_are_nowhere_but_in_the_secret(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    key = signing_key(api)
    await key.refresh()
    raw = key.current.private_bytes_raw()
    assert raw.hex() not in caplog.text
    assert raw not in b"".join(public(key))
