"""Messages about tickets between a sidecar's API server and their owner, beside those of a door and over the same channel.

    API server ──▶ owner    Book, answered with the limit of outputs; Generated, once a turn of its loop for all its streams;
                            Sized, Counted, Completed, Closed
    owner ──▶ API server    Depart: send it; Recall: do not, or end it; Recognised

Tickets are named by their API server, which counts them. Of one ticket, what is told arrives in the order in which it happened, and
so it does of several: Generated goes before whatever else is told in the same turn.
"""

import msgspec

from evenhand_engine.frontend import door_messages
from evenhand_engine.sidecar.ticket import Booking


class Book(door_messages.Call, frozen=True, kw_only=True, tag=True):
    """Queue a request, which is `ticket` from now on. Answered with the most outputs of one choice."""

    ticket: int
    booking: Booking


class Generated(msgspec.Struct, frozen=True, tag=True):
    """By ticket: so many more outputs came. The first ones are its first chunk."""

    num_tokens: dict[int, int]


class Sized(msgspec.Struct, frozen=True, tag=True):
    """See `Ticket.sized`."""

    ticket: int
    num_prompt_tokens: int
    num_cached_tokens: int


class Counted(msgspec.Struct, frozen=True, tag=True):
    """See `Ticket.counted`."""

    ticket: int
    num_output_tokens: int
    is_estimate: bool


class Completed(msgspec.Struct, frozen=True, tag=True):
    """The upstream has answered all of it."""

    ticket: int


class Closed(msgspec.Struct, frozen=True, tag=True):
    """It has ended, whether it was sent or not; also where its client left before Book was answered."""

    ticket: int
    outcome: str
    reason: str


class Depart(msgspec.Struct, frozen=True, tag=True):
    """Its turn has come: it is to be sent."""

    ticket: int


class Recall(msgspec.Struct, frozen=True, tag=True):
    """It will never be sent, or must end."""

    ticket: int
    why: door_messages.ToldRefusal


class Recognised(msgspec.Struct, frozen=True, tag=True):
    """Which engine the upstream is."""

    backend: str


OfTickets = Book | Generated | Sized | Counted | Completed | Closed
ToOwner = door_messages.ToOwner | OfTickets
ToApiServer = door_messages.ToApiServer | Depart | Recall | Recognised
