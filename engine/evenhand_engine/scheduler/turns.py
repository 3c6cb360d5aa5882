"""Turns: which streams give a token in a step that has no room for all of them.

Room is short when the token budget is, or when a tenant that streams has an inter-token objective that the step would
miss. Then tokens are handed out one by one, each to the tenant whose virtual service would be the least once it is
charged, and inside a tenant to the stream that has waited longest:

    v    ──────●────────────●───────────●──────────▶
             chat         flood      others         after the token that each would get next; chat has the objective

A tenant is *ahead* of the objective's owner if its next token would take it further than the owner's own streams take
the owner in this step. Only who is ahead waits for an objective; so a tenant never gets less than its weight's share
for the sake of another's latency. At the first token for which there is no room the step's turns end, so nobody passes
who waits: after the step none that computed is ahead of one that was left out by more than one token of that one.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import chain
from operator import attrgetter

from evenhand_engine.scheduler.pace import StepBudget
from evenhand_engine.scheduler.request import Request
from evenhand_engine.scheduler.tenant import Tenant

_NEVER = float("inf")
_NUM_COMPUTED_TOKENS = attrgetter("num_computed_tokens")

VirtualCost = Callable[[Tenant, Request], int]
"""By how much the next output of a request raises its tenant's virtual service."""


@dataclass(frozen=True, slots=True)
class Turns:
    """Who gives a token in this step.

    Attributes:
        taken: the streams of each tenant that do.
        left_out: tenants with a stream that has to wait for another step.
    """

    taken: list[tuple[Tenant, list[Request]]]
    left_out: set[str]


def take_turns(
    tenants: Iterable[Tenant], budget: StepBudget, service: Callable[[Tenant], int], cost: VirtualCost
) -> Turns:
    """Hand out the step's room for decodes. `service` is a tenant's virtual service; nobody is charged here."""
    streams = [(tenant, requests) for tenant in tenants if (requests := tenant.decodes())]
    num_streams = sum([len(requests) for _, requests in streams])
    tightest = min([tenant.inter_token_latency for tenant, _ in streams], default=_NEVER)
    everything = chain.from_iterable(requests for _, requests in streams)
    num_context = sum(map(_NUM_COMPUTED_TOKENS, everything)) if tightest != _NEVER else 0  # no objective asks for it
    if budget.has_room_for_decodes(num_streams, num_context, tightest):
        return Turns(streams, set())

    ends = sorted(
        (service(tenant) + sum(cost(tenant, request) for request in requests), tenant.inter_token_latency)
        for tenant, requests in streams
        if tenant.inter_token_latency != _NEVER
    )
    line = [(service(tenant) + cost(tenant, requests[0]), index, 0) for index, (tenant, requests) in enumerate(streams)]
    heapify(line)
    num_taken = num_owners_behind = num_context = 0
    max_seconds = _NEVER
    taken = [0] * len(streams)
    while line:
        reached, index, number = heappop(line)
        tenant, requests = streams[index]
        while num_owners_behind < len(ends) and ends[num_owners_behind][0] < reached:
            max_seconds = min(max_seconds, ends[num_owners_behind][1])
            num_owners_behind += 1
        num_taken, num_context = num_taken + 1, num_context + requests[number].num_computed_tokens
        if not budget.has_room_for_decodes(num_taken, num_context, max_seconds):
            break
        taken[index] = number + 1
        if number + 1 < len(requests):
            heappush(line, (reached + cost(tenant, requests[number + 1]), index, number + 1))
    return Turns(
        [(tenant, requests[:count]) for (tenant, requests), count in zip(streams, taken, strict=True) if count],
        {tenant.tenant_id for (tenant, requests), count in zip(streams, taken, strict=True) if count < len(requests)},
    )
