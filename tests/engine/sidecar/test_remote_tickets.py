"""Tickets whose owner is another process: the same is sent in the same order as in one, and charged the same."""

import asyncio
import random
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from evenhand_engine.backends import upstream as upstream_module
from evenhand_engine.backends.upstream import Upstream
from evenhand_engine.backends.upstream_connection import UpstreamConnection, UpstreamSettings
from evenhand_engine.dispatch.dispatcher import Dispatcher, Errand
from evenhand_engine.dispatch.window import Window
from evenhand_engine.errors import Refusal
from evenhand_engine.frontend import service
from evenhand_engine.frontend.channel import Channel
from evenhand_engine.frontend.config_in_force import ConfigInForce
from evenhand_engine.frontend.config_store import ConfigDocument
from evenhand_engine.frontend.settings import ServerSettings
from evenhand_engine.sidecar import messages, ticket
from evenhand_engine.sidecar.remote_tickets import RemoteTickets
from evenhand_engine.sidecar.service import SidecarService
from evenhand_engine.sidecar.ticket import Booking, OwnTickets, Ticket, Tickets
from evenhand_engine.sidecar.ticket_keeper import TicketKeeper
from evenhand_policy.config import Limits, SchedulerConfig, TenantConfig
from evenhand_policy.push_protocol import ConfigSource

TENANTS = ("light", "heavy", "bounded")
CONFIG = SchedulerConfig(
    tenants=(
        TenantConfig(tenant_id="light", weight=1, limits=Limits(queue_timeout_ms=2000)),
        TenantConfig(tenant_id="heavy", weight=3),
        TenantConfig(tenant_id="bounded", weight=2, limits=Limits(max_concurrent_requests=2, tokens_per_minute=5000)),
    )
)

KINDS = ("book", "token", "usage", "whole", "refuse", "leave")
WEIGHTS = (9, 8, 2, 3, 1, 1)
NUM_TURNS = 120


class Recording(Dispatcher):
    """Notes in which order requests are sent, by their users."""

    order: list[str]

    def _send(self, errand: Errand, now: float) -> Errand:
        self.order.append(errand.user)
        return super()._send(errand, now)


class Wire:
    """Stands for a channel: whatever is sent is encoded, decoded, and received by the other side at once."""

    def __init__(self, kind: Any) -> None:
        self._decoder = msgspec.msgpack.Decoder(kind)
        self.is_closed = False
        self.receive: Any = None

    def send(self, message: msgspec.Struct) -> None:
        if not self.is_closed:
            self.receive(self._decoder.decode(msgspec.msgpack.encode(message)))


class Owner:
    """The owner, at a time that the test sets, before an upstream that nobody asks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        for module in (upstream_module, service, ticket):
            monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now))
        in_force = ConfigInForce(ConfigDocument.unversioned(CONFIG, ConfigSource.FILES))
        self.dispatcher = Recording(Window(kv_tokens=4000), CONFIG)
        self.dispatcher.order = []
        self.connection = UpstreamConnection(UpstreamSettings(url="http://127.0.0.1:9", kv_tokens=4000, max_num_seqs=4))
        self.upstream = Upstream(self.connection, self.dispatcher)
        monkeypatch.setattr(self.upstream, "_loop", SimpleNamespace(call_later=lambda *_: SimpleNamespace(cancel=int)))
        self.settings = ServerSettings()
        self.service = SidecarService(self.settings, self.upstream, in_force)
        self.keepers: list[TicketKeeper] = []
        self.connections: list[UpstreamConnection] = []

    def api_server(self) -> RemoteTickets:
        """Another process, as far as messages go."""
        there, here = Wire(messages.ToApiServer), Wire(messages.ToOwner)
        connection = UpstreamConnection(self.connection.settings)
        self.connections.append(connection)
        tickets = RemoteTickets(self.settings, connection)
        keeper = TicketKeeper(self.service, cast(Channel[Any], there))
        there.receive, here.receive = tickets._receive, keeper.receive
        tickets.channel = cast(Channel[Any], here)
        keeper.enforce(CONFIG)
        self.keepers.append(keeper)
        return tickets

    def suspend(self, tenant_id: str) -> None:
        tenants = (msgspec.structs.replace(t, suspended=t.tenant_id == tenant_id) for t in CONFIG.tenants)
        config = SchedulerConfig(tenants=tuple(tenants))
        self.service.in_force.replace(ConfigDocument.unversioned(config, ConfigSource.FILES))

    def state(self) -> dict[str, Any]:
        window, table = self.dispatcher.window, self.dispatcher.request_table
        accounts = self.service.admission.accounts
        return {
            "order": self.dispatcher.order,
            "window": (window.num_tokens, window.num_unstarted_tokens, window.num_in_flight, window.num_seats_taken),
            "learned": (window.batch_tokens, window.prefill_rate),
            "service": {i: tenant.service for i, tenant in table.tenants.items()},
            "tokens": {i: (t.num_prompt_tokens, t.num_generation_tokens) for i, t in table.tenants.items()},
            "in flight": {i: (a.num_in_flight, a.num_not_started) for i, a in accounts.items()},
            "quota": {i: a.tokens.level(self.now) for i, a in accounts.items() if a.tokens is not None},
            "refusals": {i: dict(a.refusals) for i, a in accounts.items()},
        }

    async def close(self) -> None:
        await self.upstream.close()
        for connection in self.connections:
            await connection.close()


@dataclass
class Client:
    """One request, from its booking to its end."""

    ticket: Ticket
    turn: "asyncio.Task[None]"
    is_ended: bool = False

    @property
    def is_sent(self) -> bool:
        return self.turn.done() and not self.is_ended and self.turn.exception() is None

    @property
    def reason(self) -> str:
        """Why it has no turn, if it has none."""
        error = self.turn.exception() if self.turn.done() and not self.turn.cancelled() else None
        return error.code if isinstance(error, Refusal) else ""

    def tell(self, kind: str, rng: random.Random) -> None:
        """What came back of it."""
        match kind:
            case "token":
                self.ticket.generated(rng.randint(1, 30))
            case "usage":
                self.ticket.sized(rng.randint(1, 2000), rng.randint(0, 2000))
                self.ticket.counted(rng.randint(0, 20))
            case "whole":
                self.ticket.generated(2)
                self.ticket.counted(rng.randint(0, 20), is_estimate=True)
                self.ticket.complete()
                self.ticket.close("finished", "stop")
                self.is_ended = True
            case "refuse":
                self.ticket.sized(0)
                self.ticket.close("failed", "upstream_refused")
                self.is_ended = True


async def play(seen: list[Tickets], owner: Owner, rng: random.Random) -> dict[str, Any]:
    """What is left of it. Each turn is one process's, which sees of each request one chunk at most."""
    clients: list[tuple[int, Client]] = []
    refused, happened, faults = Counter[str](), Counter[str](), list[dict[str, Any]]()
    asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context))
    for number_of_turn in range(NUM_TURNS):
        owner.now += rng.uniform(0.001, 0.3)
        owner.upstream.pump()
        if number_of_turn == NUM_TURNS // 2:
            owner.suspend("heavy")
        process, have_come = rng.randrange(2), set[int]()
        for _ in range(rng.randrange(9)):
            mine = [client for place, client in clients if place == process and not client.is_ended]
            sent = [client for client in mine if client.is_sent]
            kind = rng.choices(KINDS, WEIGHTS)[0]
            if kind == "book":
                try:
                    ticket = await seen[process].book(booked_by(str(len(clients)), rng))
                except Refusal as refusal:
                    refused[refusal.code] += 1
                    continue
                clients.append((process, Client(ticket, asyncio.ensure_future(ticket.turn()))))
                await asyncio.sleep(0)
            elif kind == "leave" and mine:
                client = rng.choice(mine)
                client.is_ended = True
                client.turn.cancel()
                client.ticket.close("aborted", "client_gone")
            elif sent:
                client = rng.choice(sent)
                if kind == "token" and id(client) in have_come:
                    continue
                have_come.add(id(client))
                client.tell(kind, rng)
            else:
                continue
            happened[kind] += 1
        for _ in range(3):  # the end of the turn, in which it is told
            await asyncio.sleep(0)
    reasons = Counter(client.reason for _, client in clients)
    state = owner.state() | {"refused": refused, "reasons": reasons, "happened": happened}
    for _, client in clients:
        client.turn.cancel()
        await asyncio.gather(client.turn, return_exceptions=True)
        if not client.is_ended:
            client.ticket.close("aborted", "client_gone")
    assert (owner.dispatcher.window.num_tokens, owner.dispatcher.request_table.requests) == (0, {})
    assert {a.num_in_flight for a in owner.service.admission.accounts.values()} == {0}
    assert not faults
    return state


def booked_by(user: str, rng: random.Random) -> Booking:
    return Booking(
        tenant_id=rng.choice(TENANTS),
        num_prompt_tokens=rng.choice([10, 100, 1000, 3000]),
        num_choices=rng.choice([1, 1, 1, 2]),
        max_output_tokens=rng.choice([None, 20, 200]),
        user=user,
        is_silent=rng.random() < 0.2,
    )


@pytest.mark.parametrize("seed", range(8))
async def test_two_processes_send_what_one_would_in_its_order(seed: int) -> None:
    states = []
    for is_remote in (True, False):
        with pytest.MonkeyPatch.context() as patched:
            owner = Owner(patched)
            own = OwnTickets(owner.service)
            seen: list[Tickets] = [owner.api_server(), owner.api_server()] if is_remote else [own, own]
            states.append(await play(seen, owner, random.Random(seed)))
            await owner.close()
    assert states[0] == states[1]
    assert min(states[0]["happened"][kind] for kind in KINDS) > 0 and len(states[0]["order"]) > 20
    assert states[0]["reasons"].keys() >= {"", "queue_timeout", "tenant_suspended"}
