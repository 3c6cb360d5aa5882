"""The token issuer: what engines verify ServiceAccounts with, and that a change of it is told."""

import asyncio
from typing import Any

import pytest

from evenhand_operator.issuer import IssuerWatch, read_issuer
from evenhand_operator.kube import ApiError
from harness.virtual_time import VirtualTime

Json = dict[str, Any]

ONE, TWO = {"kid": "1", "kty": "RSA", "n": "a"}, {"kid": "2", "kty": "EC", "x5c": ["b"]}


class Api:
    """Answers, or raises, what was put in for a path."""

    def __init__(self, *keys: Json) -> None:
        self.discovery: Any = {"issuer": "https://issuer", "jwks_uri": "elsewhere"}
        self.key_set: Any = {"keys": list(keys)}

    async def get_raw(self, path: str) -> Json:
        answer = self.discovery if "configuration" in path else self.key_set
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, dict)
        return answer


def watch(api: Any) -> tuple[IssuerWatch, list[int]]:
    """The watch, and how many keys there were at each change that it told."""
    told: list[int] = []
    issuer = IssuerWatch(api, lambda: told.append(len(issuer.issuer.jwks["keys"]) if issuer.issuer else 0))
    return issuer, told


async def test_issuer_and_its_keys_are_read_in_a_fixed_order() -> None:
    found: Any = await read_issuer(Api(TWO, ONE))  # type: ignore[arg-type]
    assert (found.issuer, found.jwks) == ("https://issuer", {"keys": [ONE, TWO]})
    assert await read_issuer(Api(ONE, TWO)) == found, "or each reading would be a new document"  # type: ignore[arg-type]


async def test_change_is_told_once_and_what_is_the_same_is_not() -> None:
    api = Api(ONE)
    issuer, told = watch(api)
    await issuer.read()
    assert told == [1]
    await issuer.read()
    assert told == [1]
    api.key_set = {"keys": [ONE, TWO]}  # a signing key is rotated: the new one first, before tokens are signed with it
    await issuer.read()
    assert told == [1, 2]
    api.key_set = {"keys": [TWO]}
    await issuer.read()
    assert told == [1, 2, 1]
    api.discovery = {"issuer": "https://another"}
    await issuer.read()
    assert len(told) == 4
    assert issuer.issuer is not None and issuer.issuer.issuer == "https://another"


@pytest.mark.parametrize(
    ("member", "answer"),
    [
        ("discovery", ApiError(403, "forbidden")),
        ("key_set", ApiError(404, "not found")),
        ("discovery", {"jwks_uri": "x"}),
        ("key_set", {"keys": [{"kid": 1}]}),
    ],
)
async def test_issuer_that_is_not_told_leaves_what_is_known(member: str, answer: Any) -> None:
    api = Api(ONE)
    issuer, told = watch(api)
    await issuer.read()
    known = issuer.issuer
    setattr(api, member, answer)
    await issuer.read()
    assert (issuer.issuer, told) == (known, [1])


def test_api_server_that_is_away_is_asked_until_it_answers(virtual_time: VirtualTime) -> None:
    async def scenario() -> list[int]:
        api = Api(ONE)
        api.key_set = ApiError(0, "away")
        issuer, told = watch(api)
        reading = asyncio.create_task(issuer.read())
        await asyncio.sleep(100)
        assert not reading.done()
        api.key_set = {"keys": [ONE]}
        await reading
        return told

    assert virtual_time.run(scenario()) == [1]


def test_keys_are_read_again_and_again(virtual_time: VirtualTime) -> None:
    async def scenario() -> None:
        api = Api(ONE)
        issuer, told = watch(api)
        running = asyncio.create_task(issuer.run(refresh_seconds=300))
        await asyncio.sleep(301)
        assert told == [1]
        api.key_set = {"keys": [ONE, TWO]}
        await asyncio.sleep(300)
        assert told == [1, 2]
        running.cancel()

    virtual_time.run(scenario())
