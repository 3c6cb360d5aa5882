"""Admission: what a tenant may send now. Token buckets, queue and size limits, audit. Pure: time is an argument.

Owns each tenant's quota and its count of requests in flight. The scheduler enforces the rest: concurrency, queue
timeout, memory. Called by the server alone; a reservation is one synchronous call, so concurrent requests cannot
overshoot.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from evenhand_engine.errors import Refusal
from evenhand_engine.frontend.quota import TokenBucket
from evenhand_policy.config import DEFAULT_TENANT_ID, Enforcement, SchedulerConfig, TenantConfig

_MIN_RETRY_SECONDS = 1.0
_DRAIN_SMOOTHING = 0.2  # weight of the newest interval in the mean time between two requests that end


@dataclass(frozen=True, slots=True)
class Cost:
    """What one prompt may use at most: tokens in, tokens out."""

    num_prompt_tokens: int
    max_output_tokens: int

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens + self.max_output_tokens


@dataclass(slots=True, eq=False)
class Reservation:
    """The claim of one prompt on its tenant's quota, from `Admission.reserve` to `Admission.settle`."""

    account: "TenantAccount"
    cost: Cost
    counted: bool  # False: over a limit that is only audited, so it holds no quota
    started: bool = False


@dataclass(slots=True, eq=False)
class TenantAccount:
    """Live state of one tenant at the door."""

    config: TenantConfig
    requests: TokenBucket | None = None
    tokens: TokenBucket | None = None
    num_in_flight: int = 0
    num_not_started: int = 0
    refusals: Counter[str] = field(default_factory=Counter)
    audited: Counter[str] = field(default_factory=Counter)
    busy_since: float = 0.0
    seconds_per_request: float | None = None  # mean time between two requests that end while others wait

    @property
    def audits(self) -> bool:
        return self.config.enforcement is Enforcement.AUDIT


class Admission:
    """Who may send how much, as one config and the model say.

    Args:
        config: the config to enforce.
        max_model_len: most tokens of one request, prompt and output together.
        now: seconds on the clock that every later call uses.
        num_replicas: engines that share the config's limits; each enforces its part.
    """

    def __init__(self, config: SchedulerConfig, *, max_model_len: int, now: float, num_replicas: int = 1) -> None:
        self._max_model_len = max_model_len
        self._accounts: dict[str, TenantAccount] = {}
        self.reconfigure(config, now, num_replicas)

    def reconfigure(self, config: SchedulerConfig, now: float, num_replicas: int = 1) -> None:
        """Enforce `config` from now on. Buckets keep how full they are, in proportion to their size."""
        self._num_replicas = num_replicas
        tenants = {DEFAULT_TENANT_ID: TenantConfig(tenant_id=DEFAULT_TENANT_ID)}
        tenants |= {tenant.tenant_id: tenant for tenant in config.tenants}
        accounts = {tenant_id: self._accounts.get(tenant_id) or TenantAccount(t) for tenant_id, t in tenants.items()}
        for tenant_id, account in accounts.items():
            account.config = tenants[tenant_id]
            self._resize_buckets(account, now)
        self._accounts = accounts

    def _resize_buckets(self, account: TenantAccount, now: float) -> None:
        limits = account.config.limits
        account.requests = TokenBucket.resized(account.requests, limits.requests_per_minute, self._num_replicas, 1, now)
        max_prompt = limits.max_prompt_tokens or self._max_model_len
        max_output = limits.max_output_tokens or self._max_model_len
        account.tokens = TokenBucket.resized(
            account.tokens,
            limits.tokens_per_minute,
            self._num_replicas,
            min(max_prompt + max_output, self._max_model_len),
            now,
        )

    @property
    def accounts(self) -> dict[str, TenantAccount]:
        """Every tenant of the config, and the default one, by id. To be read only."""
        return self._accounts

    def account(self, tenant_id: str) -> TenantAccount:
        """The tenant's account; the default tenant's if the config has just lost the tenant."""
        return self._accounts.get(tenant_id) or self._accounts[DEFAULT_TENANT_ID]

    def check(self, tenant_id: str, num_requests: int, now: float) -> None:
        """Refuse cheaply, before the prompt is tokenized, what would be refused for certain; reserves nothing."""
        account = self.account(tenant_id)
        refusal = self._refuse_suspended(account) or self._refuse_amount(account, num_requests, 0, now)
        if refusal is not None and (refusal.status == 403 or not account.audits):
            account.refusals[refusal.code] += 1
            raise refusal

    def count_request(self, tenant_id: str, now: float) -> None:
        """Take one request of the quota for work that the engine has no part in, or raise Refusal."""
        account = self.account(tenant_id)
        refusal = self._refuse_suspended(account)
        over = refusal or _gravest(self._refuse_rates(account, 1, 0, now))
        self._judge(account, refusal, over)
        if over is None and account.requests is not None:
            account.requests.take(1, now)

    def max_output_tokens(self, tenant_id: str, num_prompt_tokens: int) -> int:
        """The output limit of a request that names none: the policy's, else what context and quota leave; >= 1."""
        account = self.account(tenant_id)
        room = self._max_model_len - num_prompt_tokens
        if not account.audits:
            room = min(room, account.config.limits.max_output_tokens or room)
            if account.tokens is not None:
                room = min(room, math.floor(account.tokens.capacity) - num_prompt_tokens)
        return max(room, 1)

    def reserve(self, tenant_id: str, costs: Sequence[Cost], now: float) -> list[Reservation]:
        """Take quota for all prompts of one request, or for none of them and raise Refusal."""
        account = self.account(tenant_id)
        refusal = self._refuse_suspended(account) or self._refuse_context(costs)
        num_tokens = sum(cost.num_tokens for cost in costs)
        over = refusal or self._refuse_sizes(account, costs)
        over = over or self._refuse_amount(account, len(costs), num_tokens, now)
        self._judge(account, refusal, over)
        return [self._take(account, cost, over is None, now) for cost in costs]

    def _judge(self, account: TenantAccount, refusal: Refusal | None, over: Refusal | None) -> None:
        """Raise what no audit mode lets through, `refusal`; of limits, `over`, only what is enforced."""
        if over is None:
            return
        if over is refusal or not account.audits:
            account.refusals[over.code] += 1
            raise over
        account.audited[over.code] += 1

    def _take(self, account: TenantAccount, cost: Cost, counted: bool, now: float) -> Reservation:
        if counted:
            if account.requests is not None:
                account.requests.take(1, now)
            if account.tokens is not None:
                account.tokens.take(cost.num_tokens, now)
            if account.num_in_flight == 0:
                account.busy_since = now
            account.num_in_flight += 1
            account.num_not_started += 1
        return Reservation(account, cost, counted)

    def start(self, reservation: Reservation) -> None:
        """The scheduler has begun the request: it has left the queue."""
        if not reservation.started:
            reservation.started = True
            reservation.account.num_not_started -= reservation.counted

    def settle(self, reservation: Reservation, num_output_tokens: int, now: float) -> None:
        """Give back what the request did not use. Called once, when it has ended in whatever way.

        A request that never started has used nothing; one that did has used its prompt and `num_output_tokens`.
        """
        account = reservation.account
        if not reservation.counted:
            return
        account.num_in_flight -= 1
        unused = reservation.cost.max_output_tokens - num_output_tokens
        if not reservation.started:
            unused = reservation.cost.num_tokens
            account.num_not_started -= 1
            if account.requests is not None:
                account.requests.give_back(1, now)
        if account.tokens is not None:
            account.tokens.give_back(unused, now)
        self._note_drain(account, now)

    def _note_drain(self, account: TenantAccount, now: float) -> None:
        interval = now - account.busy_since
        account.busy_since = now
        mean = account.seconds_per_request
        account.seconds_per_request = interval if mean is None else mean + _DRAIN_SMOOTHING * (interval - mean)

    def queue_delay(self, tenant_id: str) -> float:
        """Seconds until one place in the tenant's queue is free, at the pace at which its requests end."""
        return max(self.account(tenant_id).seconds_per_request or 0.0, _MIN_RETRY_SECONDS)

    def _refuse_suspended(self, account: TenantAccount) -> Refusal | None:
        if not account.config.suspended:
            return None
        return Refusal(403, "tenant_suspended", f"Tenant {account.config.tenant_id} is suspended.")

    def _refuse_context(self, costs: Sequence[Cost]) -> Refusal | None:
        limit = self._max_model_len
        cost = next((cost for cost in costs if cost.num_tokens > limit), None)
        if cost is None:
            return None
        return Refusal(
            400,
            "context_length_exceeded",
            f"This model's context is {limit} tokens, but the request needs {cost.num_tokens}: "
            f"{cost.num_prompt_tokens} of the prompt and {cost.max_output_tokens} of output. Shorten one of them.",
            param="max_tokens" if cost.num_prompt_tokens < limit else None,
        )

    def _refuse_sizes(self, account: TenantAccount, costs: Sequence[Cost]) -> Refusal | None:
        limits = account.config.limits
        for code, limit, size in (
            ("max_prompt_tokens", limits.max_prompt_tokens, max(cost.num_prompt_tokens for cost in costs)),
            ("max_output_tokens", limits.max_output_tokens, max(cost.max_output_tokens for cost in costs)),
        ):
            if limit is not None and size > limit:
                what = "prompt" if code == "max_prompt_tokens" else "output"
                param = "prompt" if code == "max_prompt_tokens" else "max_tokens"
                message = f"The policy of tenant {account.config.tenant_id} allows {limit} {what} tokens, not {size}."
                return Refusal(400, code, message, param=param)
        return None

    def _refuse_amount(self, account: TenantAccount, num_requests: int, num_tokens: int, now: float) -> Refusal | None:
        refusals = self._refuse_rates(account, num_requests, num_tokens, now)
        queue = self._refuse_queue(account, num_requests)
        return _gravest(refusals if queue is None else [*refusals, queue])

    def _refuse_rates(self, account: TenantAccount, num_requests: int, num_tokens: int, now: float) -> list[Refusal]:
        refusals = []
        tenant_id = account.config.tenant_id
        for bucket, amount, unit, param in (
            (account.requests, num_requests, "requests", "prompt"),
            (account.tokens, num_tokens, "tokens", "max_tokens"),
        ):
            if bucket is None or (wait := bucket.wait(amount, now)) <= 0:
                continue
            code = f"{unit}_per_minute"
            if math.isinf(wait):
                size = math.floor(bucket.capacity)
                message = f"The request needs {amount} {unit}, but tenant {tenant_id} may use {size} at once."
                refusals.append(Refusal(400, code, message, param=param))
            else:
                message = f"Tenant {tenant_id} has used its {bucket.limit} {unit} per minute. Wait {wait:.1f} s."
                refusals.append(Refusal(429, code, message, retry_after=wait))
        return refusals

    def _refuse_queue(self, account: TenantAccount, num_requests: int) -> Refusal | None:
        limits, tenant_id = account.config.limits, account.config.tenant_id
        if limits.max_queued_requests is None:
            return None
        room = math.ceil(limits.max_queued_requests / self._num_replicas)
        if limits.max_concurrent_requests is not None:
            room += math.ceil(limits.max_concurrent_requests / self._num_replicas)
            occupied = account.num_in_flight
        else:
            room = max(room, 1)  # for the request that need not wait
            occupied = account.num_not_started
        if num_requests > room:
            message = f"The request has {num_requests} prompts, but tenant {tenant_id} may have {room} in the engine."
            return Refusal(400, "queue_full", message, param="prompt")
        excess = occupied + num_requests - room
        if excess <= 0:
            return None
        message = f"The queue of tenant {tenant_id} is full ({limits.max_queued_requests} requests)."
        delay = max(excess * (account.seconds_per_request or 0.0), _MIN_RETRY_SECONDS)
        return Refusal(429, "queue_full", message, retry_after=delay)


def _gravest(refusals: list[Refusal]) -> Refusal | None:
    """The one that no wait ends, else the one that waits longest: what is answered must be true of all."""
    return max(
        refusals, key=lambda refusal: math.inf if refusal.retry_after is None else refusal.retry_after, default=None
    )
