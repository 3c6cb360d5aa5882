"""RemoteTickets: the door of a sidecar's API server that gives out tickets too, whose owner is another process.

What comes back of requests is told once a turn of the event loop, added up by request, and not waited for.
"""

import asyncio
from typing import Any

from evenhand_engine.backends.upstream_connection import UpstreamConnection
from evenhand_engine.errors import EngineDeadError, Refusal
from evenhand_engine.frontend.admission import tenants_of
from evenhand_engine.frontend.remote_door import RemoteDoor
from evenhand_engine.frontend.settings import ServerSettings
from evenhand_engine.sidecar import messages
from evenhand_engine.sidecar.ticket import Booking, Ticket
from evenhand_policy.config import DEFAULT_TENANT_ID, SchedulerConfig, TenantConfig


class RemoteTickets(RemoteDoor):
    """See `Tickets` and `Door`.

    Args:
        connection: of this process, which is told what the owner finds out of the upstream.
    """

    def __init__(self, settings: ServerSettings, connection: UpstreamConnection) -> None:
        super().__init__(settings, messages.ToApiServer)
        self._connection = connection
        self._tenants: dict[str, TenantConfig] = {}
        self._tickets: dict[int, _RemoteTicket] = {}
        self._generated: dict[int, int] = {}  # yet to be told

    # -- Tickets

    def tenant(self, tenant_id: str) -> TenantConfig:
        return self._tenants.get(tenant_id) or self._tenants[DEFAULT_TENANT_ID]

    async def book(self, booking: Booking) -> Ticket:
        self._tell()  # what came before it
        number = self.new_number()
        ticket = self._tickets[number] = _RemoteTicket(self, number)
        try:
            ticket.limit = await self.call(
                messages.Book(call_id=self.new_number(), ticket=number, booking=booking), int
            )
        except Refusal:  # the owner holds nothing
            del self._tickets[number]
            raise
        except BaseException:  # he may hold it
            ticket.close("aborted", "client_gone")
            raise
        return ticket

    # -- what tickets tell

    def note(self, number: int, num_tokens: int) -> None:
        """So many more outputs came, which is told at the end of this turn of the loop."""
        if not self._generated:
            self._loop.call_soon(self._tell)
        self._generated[number] = self._generated.get(number, 0) + num_tokens

    def tell(self, message: messages.OfTickets) -> None:
        self._tell()
        self.channel.send(message)

    def forget(self, number: int) -> None:
        """It is closed."""
        del self._tickets[number]

    def _tell(self) -> None:
        if self._generated:
            generated, self._generated = self._generated, {}
            self.channel.send(messages.Generated(generated))

    # -- RemoteDoor

    def enforce(self, config: SchedulerConfig, is_configured: bool) -> None:
        self._tenants = tenants_of(config)
        super().enforce(config, is_configured)

    def take_other(self, message: Any) -> None:
        match message:
            case messages.Depart():
                if (ticket := self._tickets.get(message.ticket)) is not None:
                    ticket.call(None)
            case messages.Recall():
                if (ticket := self._tickets.get(message.ticket)) is not None:
                    ticket.call(message.why.refusal())
            case messages.Recognised():
                self._connection.backend = message.backend

    def lose(self) -> None:
        super().lose()
        for ticket in self._tickets.values():
            ticket.abandon()


class _RemoteTicket:
    """See `Ticket`.

    Attributes:
        num_output_tokens: without what the owner estimates of an answer that came as a whole.
    """

    __slots__ = ("_number", "_refusal", "_tickets", "_turn", "limit", "num_output_tokens")

    def __init__(self, tickets: RemoteTickets, number: int) -> None:
        self.limit = 0  # until the owner has answered
        self.num_output_tokens = 0
        self._number = number
        self._tickets = tickets
        self._turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._refusal: Refusal | None = None  # why it must end

    async def turn(self) -> None:
        await self._turn
        if self._refusal is not None:
            raise self._refusal

    def call(self, refusal: Refusal | None) -> None:
        """Its turn has come, or there is none, or no more."""
        self._refusal = refusal
        if not self._turn.done():
            self._turn.set_result(None)

    def abandon(self) -> None:
        """The owner is gone: whoever waits for him waits in vain, and what runs goes on."""
        if not self._turn.done():
            self._turn.set_exception(EngineDeadError("the process that owns the queue is gone"))
            self._turn.exception()  # retrieved: nobody may be waiting

    def generated(self, num_tokens: int) -> Refusal | None:
        self.num_output_tokens += num_tokens
        self._tickets.note(self._number, num_tokens)
        return self._refusal

    def sized(self, num_prompt_tokens: int, num_cached_tokens: int = 0) -> None:
        self._tickets.tell(messages.Sized(self._number, num_prompt_tokens, num_cached_tokens))

    def counted(self, num_output_tokens: int, *, is_estimate: bool = False) -> None:
        self.num_output_tokens = num_output_tokens
        self._tickets.tell(messages.Counted(self._number, num_output_tokens, is_estimate))

    def complete(self) -> None:
        self._tickets.tell(messages.Completed(self._number))

    def close(self, outcome: str, reason: str) -> None:
        self._tickets.forget(self._number)
        self._tickets.tell(messages.Closed(self._number, outcome, reason))
