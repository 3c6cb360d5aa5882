"""Ledger: what everybody was served, by weight: charges, the virtual time, and how far ahead one may be.

    virtual time V                                                      limit
         │                                                                │
    ─────●──────────●─────────────●───────────────●───────────────────────┼─────●──────▶  virtual service v
      who was     computes,     computes        computes                  │   too far ahead: starts nothing,
      left out    first         after it        last                      │   and what runs for it pauses

Nobody's v is below V. A step that leaves somebody out moves V to the least v of those; a step that leaves nobody out
moves it to the highest v of all. The limit is as far ahead of the least served who contends as `lead` allows.

It knows no memory, seats or places: whatever shares something by weight can keep its accounts here.
"""

from collections.abc import Iterable, Sequence

from evenhand_engine.config import SchedulerSettings
from evenhand_engine.scheduler.fair_share import VIRTUAL_UNIT, FairShare
from evenhand_engine.scheduler.request import Request
from evenhand_engine.scheduler.tenant import Tenant
from evenhand_policy.config import Prices

_CONTEXT = 1_000  # tokens that `Prices.context_token` is for


class Ledger:
    """The one place where tenants and their users are charged.

    Attributes:
        shares: the tenants' virtual service.
        prices: what tokens cost.
        limit: virtual service beyond which a tenant may compute nothing in this step; None: nobody is that far ahead.
        is_congested: whether the last step left somebody out.
    """

    def __init__(self, settings: SchedulerSettings) -> None:
        """`settings`: how large a step, a request and the preemption lag may be, which a lead and a bound come from."""
        self.shares = FairShare()
        self.prices = Prices()
        self.limit: int | None = None
        self.is_congested = False
        self._settings = settings
        self._charged_per_user: dict[str, Tenant] = {}  # in this step

    def service(self, tenant: Tenant) -> int:
        """The tenant's virtual service, in VIRTUAL_UNITs."""
        return self.shares.virtual_service(tenant.tenant_id)

    # -- how far ahead

    @property
    def slack(self) -> int:
        """How far ahead of the least served a tenant of a higher class may go first: the cost of one step."""
        tokens, dearest = self._settings.max_num_batched_tokens, max(self.prices.input_token, self.prices.output_token)
        return (tokens * dearest + self._step_context()) * VIRTUAL_UNIT

    def lead(self, weight: int) -> int:
        """How far ahead of a backlogged tenant of this weight another may go on computing: the slack, the longest
        prompt and the preemption lag. So before anybody must pause, preemption may serve who is behind."""
        behind = self.prompt_cost(0, self._settings.max_model_len) + self._settings.preemption_lag
        return self.slack + behind * VIRTUAL_UNIT // weight

    def lag_bound(self, weights: Iterable[int]) -> int:
        """How far behind any other a backlogged tenant may be, but for what exempt requests still compute; `weights`:
        of all that compete."""
        settings, lightest = self._settings, min(weights, default=1)
        step = settings.max_num_batched_tokens * self.prices.input_token
        step += settings.max_num_outputs * self.prices.output_token + self._step_context()
        return self.lead(lightest) + step * VIRTUAL_UNIT // lightest

    def is_ahead(self, tenant: Tenant) -> bool:
        """Whether the tenant is too far ahead to compute."""
        return self.limit is not None and self.service(tenant) > self.limit

    # -- what it costs

    def prompt_cost(self, start: int, end: int) -> int:
        """Of the prompt's tokens [start, end), in units of price."""
        return (end - start) * self.prices.input_token + self._context_cost(start, end)

    def output_cost(self, request: Request, start: int, end: int) -> int:
        """Of the request's outputs at the positions [start, end). An output is computed from the token before it, whose
        context it pays for; the prompt paid for that of the first."""
        cost = (end - start) * self.prices.output_token
        if self.prices.context_token:
            first = request.num_prompt_tokens
            cost += self._context_cost(max(first, start - 1), max(first, end - 1))
        return cost

    def next_output_cost(self, tenant: Tenant, request: Request) -> int:
        """By how much the request's next output raises its tenant's virtual service."""
        cost = self.output_cost(request, request.num_tokens, request.num_tokens + 1)
        return cost * VIRTUAL_UNIT // tenant.weight

    # -- charges

    def charge_prompt(self, tenant: Tenant, request: Request, start: int, end: int) -> None:
        """Charge those of the tokens [start, end) that are prompt and were never computed before."""
        start, end = max(start, request.num_charged_tokens), min(end, request.num_prompt_tokens)
        if start < end:
            request.num_charged_tokens = end
            tenant.num_prompt_tokens += end - start
            self._charge_one(tenant, request, self.prompt_cost(start, end))

    def charge_outputs(self, tenant: Tenant, requests: Sequence[Request]) -> None:
        """Charge the next output of each request, which is in flight now."""
        tenant.num_generation_tokens += len(requests)
        if self.prices.context_token:
            costs = [self.output_cost(r, r.num_tokens - 1, r.num_tokens) for r in requests]
        else:  # of every stream in every step: all cost the same
            costs = [self.prices.output_token] * len(requests)
        self._charge(tenant, requests, costs)

    def correct_outputs(self, tenant: Tenant, request: Request, charged: int, end: int) -> None:
        """Outputs were charged up to the position `charged`, and there are some up to `end`: fewer, so that the rest is
        given back, or more."""
        tenant.num_generation_tokens += end - charged
        cost = self.output_cost(request, min(charged, end), max(charged, end))
        self._charge_one(tenant, request, cost if end > charged else -cost)

    def correct_prompt(self, tenant: Tenant, request: Request, num_tokens: int) -> None:
        """A prompt that was charged by an estimate turns out to cost `num_tokens`: more is charged, less given back."""
        charged, request.num_charged_tokens = request.num_charged_tokens, num_tokens
        tenant.num_prompt_tokens += num_tokens - charged
        cost = self.prompt_cost(0, num_tokens) - self.prompt_cost(0, charged)
        self._charge_one(tenant, request, cost)

    def _charge(self, tenant: Tenant, requests: Sequence[Request], costs: Sequence[int]) -> None:
        total = sum(costs)
        tenant.service += total
        self.shares.charge(tenant.tenant_id, total, tenant.weight)
        if tenant.waiting.per_user:
            self._charged_per_user[tenant.tenant_id] = tenant
            for request, cost in zip(requests, costs, strict=True):
                tenant.waiting.charge(request, cost)

    def _charge_one(self, tenant: Tenant, request: Request, cost: int) -> None:
        tenant.service += cost
        self.shares.charge(tenant.tenant_id, cost, tenant.weight)
        if tenant.waiting.per_user:
            self._charged_per_user[tenant.tenant_id] = tenant
            tenant.waiting.charge(request, cost)

    # -- a step

    def open_step(self, least_served: Tenant | None) -> None:
        """Set the limit of the step that begins: `least_served` is who is furthest behind of those that contend."""
        self.limit = None
        if self.is_congested and least_served is not None:
            self.limit = self.service(least_served) + self.lead(least_served.weight)

    def close_step(self, left_out: set[str]) -> None:
        """Advance the virtual time to the least of those that the step left out."""
        self.is_congested = bool(left_out)
        self.shares.close_step(left_out)
        for charged in self._charged_per_user.values():
            charged.waiting.close_step(charged.prefilling.values())
        self._charged_per_user.clear()

    # -- inside

    def _context_cost(self, start: int, end: int) -> int:
        """What tokens at the positions [start, end) owe for all before them. Differences of one rounded sum, so that
        however the tokens are split among steps, a request pays for its context once, to the unit."""
        price = self.prices.context_token
        if not price or start >= end:
            return 0
        return price * (end * (end - 1) // 2) // _CONTEXT - price * (start * (start - 1) // 2) // _CONTEXT

    def _step_context(self) -> int:
        """The most that one step's tokens can owe for their context, rounded up for each request."""
        if not self.prices.context_token:
            return 0
        pairs = self._settings.max_num_batched_tokens * self._settings.max_model_len
        return self.prices.context_token * pairs // _CONTEXT + self._settings.max_num_seqs
