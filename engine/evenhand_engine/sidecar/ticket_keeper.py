"""TicketKeeper: the owner's end of the channel to one API server of a sidecar. Holds its tickets, which its messages drive.

A ticket here is the very one that a single process would hold, so nothing is decided twice. When the API server is gone its tickets
are closed: what was told is charged, seats and quota are given back.
"""

import functools
from typing import Any

from evenhand_engine.errors import Refusal
from evenhand_engine.frontend.channel import Channel
from evenhand_engine.frontend.door_messages import ToldRefusal
from evenhand_engine.frontend.doorkeeper import Doorkeeper
from evenhand_engine.sidecar import messages
from evenhand_engine.sidecar.service import SidecarService
from evenhand_engine.sidecar.ticket import OwnTicket
from evenhand_policy.config import SchedulerConfig


class TicketKeeper:
    """Serves one API server; see `Doorkeeper`."""

    def __init__(self, service: SidecarService, channel: Channel[Any]) -> None:
        self._service = service
        self._channel = channel
        self._doorkeeper = Doorkeeper(service, channel, lambda change: None)  # what is in flight the upstream counts
        self._tickets: dict[int, OwnTicket] = {}
        service.upstream.recognised.append(self._tell_backend)

    @property
    def is_current(self) -> bool:
        return self._doorkeeper.is_current

    def enforce(self, config: SchedulerConfig, *, is_configured: bool = True) -> None:
        self._doorkeeper.enforce(config, is_configured=is_configured)
        self._tell_backend(self._service.backend_name)

    def close(self) -> int:
        """Give back everything; returns how many requests ended by that."""
        self._service.upstream.recognised.remove(self._tell_backend)
        self._doorkeeper.close()
        tickets, self._tickets = self._tickets, {}
        self._service.upstream.end(*(ticket.errand for ticket in tickets.values()))  # at once: room is for who is left
        for ticket in tickets.values():
            ticket.close("failed", "api_server_dead")
        return len(tickets)

    def receive(self, message: Any) -> None:
        """Take in one message of the API server."""
        match message:
            case messages.Generated():
                for number, num_tokens in message.num_tokens.items():
                    if (refusal := self._tickets[number].generated(num_tokens)) is not None:
                        self._recall(number, refusal)
            case messages.Book():
                self._book(message)
            case messages.Sized():
                self._tickets[message.ticket].sized(message.num_prompt_tokens, message.num_cached_tokens)
            case messages.Counted():
                self._tickets[message.ticket].counted(message.num_output_tokens, is_estimate=message.is_estimate)
            case messages.Completed():
                self._tickets[message.ticket].complete()
            case messages.Closed():
                self._close(message)
            case _:
                self._doorkeeper.receive(message)

    def _book(self, call: messages.Book) -> None:
        self._doorkeeper.answer(call.call_id, functools.partial(self._open, call))
        if (ticket := self._tickets.get(call.ticket)) is not None:
            ticket.queue(functools.partial(self._call, call.ticket))

    def _open(self, call: messages.Book) -> int:
        ticket = self._tickets[call.ticket] = OwnTicket(self._service, call.booking)
        return ticket.limit

    def _call(self, number: int, refusal: Refusal | None) -> None:
        if refusal is None:
            self._channel.send(messages.Depart(number))
        else:
            self._recall(number, refusal)

    def _recall(self, number: int, refusal: Refusal) -> None:
        self._channel.send(messages.Recall(number, ToldRefusal.of(refusal)))

    def _close(self, closed: messages.Closed) -> None:
        ticket = self._tickets.pop(closed.ticket, None)
        if ticket is not None:  # else it was refused, while its client left
            ticket.close(closed.outcome, closed.reason)

    def _tell_backend(self, backend: str) -> None:
        self._channel.send(messages.Recognised(backend))
