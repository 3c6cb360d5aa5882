"""A channel to a side that stands still is bounded, and ends."""

import asyncio
import socket

import pytest

from evenhand_engine.frontend import channel as channel_module
from evenhand_engine.frontend.channel import Channel
from evenhand_engine.frontend.door_messages import RefusalCounted

WAIT_SECONDS = 120.0
KIBIBYTE = 1024


class End:
    """One end of a channel."""

    def __init__(self) -> None:
        self.received: list[RefusalCounted] = []
        self.news = asyncio.Event()
        self.lost = asyncio.Event()
        self.channel: Channel[RefusalCounted] = Channel(RefusalCounted, self._receive, self.lost.set)

    def _receive(self, message: RefusalCounted) -> None:
        self.received.append(message)
        self.news.set()


def message(num_bytes: int) -> RefusalCounted:
    return RefusalCounted("t" * num_bytes, "queue_full")


@pytest.fixture(autouse=True)
def limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_module, "_MAX_UNREAD_BYTES", 256 * KIBIBYTE)


async def test_what_is_not_read_is_bounded() -> None:
    ours, theirs = socket.socketpair()
    end = End()
    await end.channel.open(ours)
    transport = end.channel._transport
    assert transport is not None
    most = 0
    for _ in range(4096):
        end.channel.send(message(KIBIBYTE))
        most = max(most, transport.get_write_buffer_size())
    assert 256 * KIBIBYTE <= most < 260 * KIBIBYTE
    await asyncio.wait_for(end.lost.wait(), WAIT_SECONDS)
    end.channel.send(message(KIBIBYTE))
    assert end.channel.is_closed
    theirs.close()


async def test_one_message_may_be_of_any_size_and_who_reads_gets_all() -> None:
    ours, theirs = socket.socketpair()
    end, other = End(), End()
    await end.channel.open(ours)
    await other.channel.open(theirs)
    for num_bytes in (4096 * KIBIBYTE, 10, 4096 * KIBIBYTE):
        other.news.clear()
        end.channel.send(message(num_bytes))
        await asyncio.wait_for(other.news.wait(), WAIT_SECONDS)
    assert [len(each.tenant_id) for each in other.received] == [4096 * KIBIBYTE, 10, 4096 * KIBIBYTE]
    end.channel.close()
    await asyncio.wait_for(other.lost.wait(), WAIT_SECONDS)
    await asyncio.wait_for(end.lost.wait(), WAIT_SECONDS)
