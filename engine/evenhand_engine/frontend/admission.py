"""Admission: what a tenant may send now. Token buckets, queue and size limits, audit. Pure: time is an argument.

A request passes in this order: `check` takes one request of the quota, before anything is read or tokenized; `reserve`
takes the rest, for all its prompts or for none; `start` and `generated` follow it; `settle` ends it. Each is one
synchronous call, so concurrent requests cannot overshoot. The scheduler enforces the rest: concurrency, queue timeout,
memory. What one tenant has used and how it drains is its `account`.
"""

import math
from collections.abc import Sequence

from evenhand_engine.errors import Refusal
from evenhand_engine.frontend.account import Cost, Reservation, TenantAccount
from evenhand_engine.frontend.quota import TokenBucket
from evenhand_policy.config import DEFAULT_TENANT_ID, SchedulerConfig, TenantConfig

_MIN_RETRY_SECONDS = 1.0


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
        tenants = tenants_of(config)
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

    def check(self, tenant_id: str, now: float) -> int:
        """Refuse cheaply, before anything is read, what would be refused for certain; else take one request of the quota.

        It is paid for what reading and tokenizing cost, whatever comes of it. Returns how many requests were taken, for
        `reserve`: 0 if the quota is only audited and used up.
        """
        account = self.account(tenant_id)
        refusal = self._refuse_suspended(account) or self._refuse_amount(account, 1, 0, now)
        if refusal is None:
            account.take_requests(1, now)
            return 1
        if refusal.status == 403 or not account.audits:
            account.refusals[refusal.code] += 1
            raise refusal
        return 0

    def count_request(self, tenant_id: str, now: float) -> None:
        """Take one request of the quota for work that the engine has no part in, or raise Refusal."""
        account = self.account(tenant_id)
        refusal = self._refuse_suspended(account)
        over = refusal or _gravest(self._refuse_rates(account, 1, 0, now))
        self._judge(account, refusal, over)
        if over is None:
            account.take_requests(1, now)

    def max_output_tokens(self, tenant_id: str, num_prompt_tokens: int) -> int:
        """The output limit of a request that names none: the policy's, else what context and quota leave; >= 1."""
        account = self.account(tenant_id)
        room = self._max_model_len - num_prompt_tokens
        if not account.audits:
            room = min(room, account.config.limits.max_output_tokens or room)
            if account.tokens is not None:
                room = min(room, math.floor(account.tokens.capacity) - num_prompt_tokens)
        return max(room, 1)

    def max_concurrent_requests(self, tenant_id: str) -> int | None:
        """This engine's part of the tenant's limit of requests that run at once; None: there is none that is enforced."""
        account = self.account(tenant_id)
        limit = None if account.audits else account.config.limits.max_concurrent_requests
        return None if limit is None else math.ceil(limit / self._num_replicas)

    def expected_output_tokens(self, tenant_id: str) -> int:
        """What a request that names no limit is likely to need: the tenant's own 95th percentile."""
        return self.account(tenant_id).expected_output_tokens

    def reserve(self, tenant_id: str, costs: Sequence[Cost], now: float, num_taken: int = 0) -> list[Reservation]:
        """Take quota for all prompts of one request, or for none of them and raise Refusal.

        `num_taken`: requests that `check` has taken already; a refusal does not give them back, and counts them again
        for what a retry must wait.
        """
        account = self.account(tenant_id)
        refusal = self._refuse_suspended(account) or self._refuse_context(costs)
        num_tokens = sum(cost.num_reserved_tokens for cost in costs)
        over = refusal or self._refuse_sizes(account, costs)
        over = over or self._refuse_amount(account, len(costs), num_tokens, now, num_taken)
        self._judge(account, refusal, over)
        if over is None:
            account.take_requests(len(costs) - num_taken, now)
        return [account.reserve(cost, over is None, now) for cost in costs]

    def _judge(self, account: TenantAccount, refusal: Refusal | None, over: Refusal | None) -> None:
        """Raise what no audit mode lets through, `refusal`; of limits, `over`, only what is enforced."""
        if over is None:
            return
        if over is refusal or not account.audits:
            account.refusals[over.code] += 1
            raise over
        account.audited[over.code] += 1

    def start(self, reservation: Reservation) -> None:
        """The scheduler has begun the request: it has left the queue."""
        reservation.account.start(reservation)

    def settle(self, reservation: Reservation, num_output_tokens: int, now: float) -> None:
        """Give back what the request did not use, or take what it used beyond. Called once, when it has ended.

        A request that never started has used nothing; one that did has used its prompt and `num_output_tokens`.
        """
        reservation.account.settle(reservation, num_output_tokens, now)

    def queue_delay(self, tenant_id: str, now: float) -> float:
        """Seconds until one place in the tenant's queue is free, at the pace at which its requests end."""
        return max(self.account(tenant_id).seconds_per_request(now), _MIN_RETRY_SECONDS)

    def _refuse_suspended(self, account: TenantAccount) -> Refusal | None:
        if not account.config.suspended:
            return None
        return Refusal(403, "tenant_suspended", f"Tenant {account.config.tenant_id} is suspended.")

    def _refuse_context(self, costs: Sequence[Cost]) -> Refusal | None:
        limit = self._max_model_len
        cost = next((cost for cost in costs if cost.num_tokens > limit), None)
        return None if cost is None else refuse_context(limit, cost.num_prompt_tokens, cost.max_output_tokens)

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

    def _refuse_amount(
        self, account: TenantAccount, num_requests: int, num_tokens: int, now: float, num_taken: int = 0
    ) -> Refusal | None:
        refusals = self._refuse_rates(account, num_requests, num_tokens, now, num_taken)
        if (queue := self._refuse_queue(account, num_requests, now)) is not None:
            refusals.append(queue)
        if refusals and num_taken:  # a retry must find them anew
            refusals += self._refuse_rates(account, num_requests, 0, now)
        return _gravest(refusals)

    def _refuse_rates(
        self, account: TenantAccount, num_requests: int, num_tokens: int, now: float, num_taken: int = 0
    ) -> list[Refusal]:
        refusals = []
        tenant_id = account.config.tenant_id
        for bucket, amount, taken, unit, param in (
            (account.requests, num_requests, num_taken, "requests", "prompt"),
            (account.tokens, num_tokens, 0, "tokens", "max_tokens"),
        ):
            if bucket is None:
                continue
            wait = math.inf if amount > bucket.capacity else bucket.wait(amount - taken, now)
            if wait <= 0:
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

    def _refuse_queue(self, account: TenantAccount, num_requests: int, now: float) -> Refusal | None:
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
        delay = max(excess * account.seconds_per_request(now), _MIN_RETRY_SECONDS)
        return Refusal(429, "queue_full", message, retry_after=delay)


def tenants_of(config: SchedulerConfig) -> dict[str, TenantConfig]:
    """Every tenant, the default one among them, by id."""
    default = TenantConfig(tenant_id=DEFAULT_TENANT_ID)
    return {DEFAULT_TENANT_ID: default} | {tenant.tenant_id: tenant for tenant in config.tenants}


def refuse_context(limit: int, num_prompt_tokens: int, max_output_tokens: int) -> Refusal:
    """Prompt and output do not fit into the model's context of `limit` tokens."""
    return Refusal(
        400,
        "context_length_exceeded",
        f"This model's context is {limit} tokens, but the request needs {num_prompt_tokens + max_output_tokens}: "
        f"{num_prompt_tokens} of the prompt and {max_output_tokens} of output. Shorten one of them.",
        param="max_tokens" if num_prompt_tokens < limit else None,
    )


def _gravest(refusals: list[Refusal]) -> Refusal | None:
    """The one that no wait ends, else the one that waits longest: what is answered must be true of all."""
    return max(
        refusals, key=lambda refusal: math.inf if refusal.retry_after is None else refusal.retry_after, default=None
    )
