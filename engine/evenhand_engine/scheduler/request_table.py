"""RequestTable: who waits, who runs, and on which KV blocks. Owner of the tenants' and requests' places.

    add ──▶ waiting ──admit──▶ prefilling ──end_prefill──▶ decoding ──finish──▶ gone
               ▲                   │                           │
               └─────preempt───────┴───────────────────────────┘

It makes each move whole, keeps the counts right and tells the news; the scheduler decides which move is made.
"""

from evenhand_engine.config import SchedulerSettings
from evenhand_engine.scheduler.capacity import KvCapacity
from evenhand_engine.scheduler.fair_share import FairShare
from evenhand_engine.scheduler.request import FinishReason, Request, RequestOutput, TokenLogprobs
from evenhand_engine.scheduler.tenant import Tenant
from evenhand_policy.config import DEFAULT_TENANT_ID, SchedulerConfig, TenantConfig


class RequestTable:
    """All live requests and their tenants.

    Attributes:
        capacity: the seats and the KV blocks.
        blocks: the KV blocks.
        active: tenants with a prompt that waits or is in progress, by id.
        running_tenants: tenants with a running request, by id.
        num_preemptions: since the start.
        outputs: news of requests that nobody has collected: first starts, tokens, ends.
    """

    def __init__(self, settings: SchedulerSettings, shares: FairShare) -> None:
        """Tenants enter `shares` when they become active, and leave its line when they no longer are."""
        self.tenants: dict[str, Tenant] = {}
        self.capacity = KvCapacity(settings, self.tenants)
        self.blocks = self.capacity.blocks
        self.active: dict[str, Tenant] = {}
        self.running_tenants: dict[str, Tenant] = {}
        self.requests: dict[str, Request] = {}
        self.num_preemptions = 0
        self.outputs: list[RequestOutput] = []
        self._settings = settings
        self._shares = shares
        self._configs: dict[str, TenantConfig] = {}
        self._num_replicas = 1
        self._num_added = 0

    @property
    def num_running(self) -> int:
        return self.capacity.num_running

    @property
    def num_waiting(self) -> int:
        return len(self.requests) - self.num_running

    def tenant(self, tenant_id: str) -> Tenant:
        """The live tenant; one that the config does not know is the default tenant."""
        config = self._configs.get(tenant_id) or self._configs[DEFAULT_TENANT_ID]
        tenant = self.tenants.get(config.tenant_id)
        if tenant is None:
            tenant = Tenant(config, num_kv_blocks=self.blocks.num_blocks, num_replicas=self._num_replicas)
            self.tenants[config.tenant_id] = tenant
        return tenant

    def configure(self, config: SchedulerConfig, num_replicas: int) -> None:
        """Enforce another config. A deleted tenant's requests go over to the default tenant."""
        self._num_replicas = num_replicas
        self._configs = {tenant.tenant_id: tenant for tenant in config.tenants}
        self._configs.setdefault(
            DEFAULT_TENANT_ID, TenantConfig(tenant_id=DEFAULT_TENANT_ID, weight=config.unknown_tenants.weight)
        )
        self.capacity.num_configured_tenants = len(config.tenants)
        num_blocks = self.blocks.num_blocks
        self.blocks.set_guarantees(
            {tenant.tenant_id: num_blocks * tenant.kv_cache.guaranteed_percent // 100 for tenant in config.tenants}
        )
        for tenant in list(self.tenants.values()):
            tenant_config = self._configs.get(tenant.tenant_id)
            if tenant_config is None:
                self._retire(tenant)
            else:
                tenant.configure(tenant_config, num_kv_blocks=num_blocks, num_replicas=num_replicas)
                if tenant.tenant_id in self.active:
                    self._shares.enter(tenant.tenant_id, tenant.class_rank)

    def guaranteed_tenants(self) -> list[Tenant]:
        """Active tenants with a KV guarantee."""
        return [self.active[tenant_id] for tenant_id in self.blocks.guarantees if tenant_id in self.active]

    # -- moves

    def add(self, request: Request) -> None:
        """A new request waits. Its tenant and cache salt are resolved here."""
        assert request.request_id not in self.requests, f"request {request.request_id} was added twice"
        tenant = self.tenant(request.tenant_id)
        self._num_added += 1
        request.position = self._num_added
        request.max_num_tokens = min(request.max_num_tokens, self._settings.max_model_len)
        request.tenant_id = tenant.tenant_id
        request.cache_salt = request.cache_salt or tenant.cache_salt
        self.requests[request.request_id] = request
        self._wait(tenant, request)

    def start(self, request: Request, now: float) -> None:
        """Waiting to prefilling: the request gets a seat, blocks for all its tokens, and what prefixes are known."""
        tenant = self.tenants[request.tenant_id]
        admitted = self.blocks.start(request)
        assert admitted, f"{request} was admitted without room"
        if request.num_preemptions == 0:
            request.num_cached_tokens = request.num_computed_tokens
            self.outputs.append(
                RequestOutput(request_id=request.request_id, num_cached_tokens=request.num_cached_tokens)
            )
        num_prompt_tokens = min(request.num_computed_tokens, request.num_prompt_tokens)
        request.num_charged_tokens = max(request.num_charged_tokens, num_prompt_tokens)
        request.started_at = now
        request.seat = self.capacity.take_seat()
        request.num_sent_blocks = 0
        tenant.waiting.remove(request)
        tenant.prefilling[request.request_id] = request
        tenant.num_running_choices += request.num_choices
        tenant.num_bypasses = 0
        self.running_tenants[tenant.tenant_id] = tenant

    def end_prefill(self, request: Request) -> None:
        """Prefilling to decoding."""
        tenant = self.tenants[request.tenant_id]
        del tenant.prefilling[request.request_id]
        tenant.decoding[request.request_id] = request
        self._deactivate(tenant)

    def preempt(self, request: Request) -> None:
        """Running to waiting: its blocks are released; its tokens and its place are kept."""
        tenant = self.tenants[request.tenant_id]
        self._stop_running(tenant, request)
        request.started_at = None
        request.num_preemptions += 1
        tenant.num_preemptions += 1
        self.num_preemptions += 1
        self._wait(tenant, request)

    def finish(
        self,
        request: Request,
        reason: FinishReason,
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprobs, ...] = (),
        prompt_logprobs: tuple[TokenLogprobs, ...] = (),
    ) -> None:
        """Out, from wherever it is: the one exit of a request. `token_ids`: its last tokens, told with the end."""
        tenant = self.tenants[request.tenant_id]
        request.finish_reason = reason
        del self.requests[request.request_id]
        if request.started_at is None:
            tenant.waiting.remove(request)
            self._deactivate(tenant)
        else:
            self._stop_running(tenant, request)
        self.outputs.append(
            RequestOutput(
                request_id=request.request_id,
                token_ids=token_ids,
                finish_reason=reason,
                num_cached_tokens=request.num_cached_tokens,
                num_preemptions=request.num_preemptions,
                num_output_tokens=request.num_output_tokens,
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs,
            )
        )

    def finish_oversized(self, request: Request) -> None:
        """End a request that outgrew the cache or its tenant's ceiling while it waited."""
        self.finish(request, FinishReason.LENGTH if request.num_output_tokens else FinishReason.OVERLOADED)

    def check_integrity(self) -> None:
        """Assert that every request has exactly one place and every count is right. For tests and idle moments."""
        tenants = self.tenants.values()
        waiting, running = [r for t in tenants for r in t.waiting], [r for t in tenants for r in t.running()]
        self.capacity.check_integrity(running)
        assert len(running) == self.num_running and len(waiting) == self.num_waiting
        assert {r.request_id for r in (*waiting, *running)} == set(self.requests)
        assert all(r.num_pending_tokens == 1 for t in tenants for r in t.decoding.values())
        assert all(not r.block_table and r.started_at is None for r in waiting)
        assert set(self.active) == {t.tenant_id for t in tenants if t.has_prompts}
        assert sorted(self.active) == sorted(tenant_id for _, _, tenant_id in self._shares.in_order())
        assert all(t.num_running_choices == sum(r.num_choices for r in t.running()) for t in tenants)
        assert set(self.running_tenants) == {t.tenant_id for t in tenants if t.num_running}
        table_blocks = {block for r in running for block in r.block_table}
        assert len(table_blocks) == sum(self.blocks.num_held_blocks(t.tenant_id) for t in tenants)

    def _wait(self, tenant: Tenant, request: Request) -> None:
        tenant.waiting.push(request)
        self._activate(tenant)

    def _stop_running(self, tenant: Tenant, request: Request) -> None:
        self.blocks.release(request)
        self.capacity.leave_seat(request.seat)
        request.seat = -1
        tenant.num_running_choices -= request.num_choices
        if tenant.prefilling.pop(request.request_id, None) is None:
            del tenant.decoding[request.request_id]
        if not tenant.num_running:
            del self.running_tenants[tenant.tenant_id]
        self._deactivate(tenant)

    def _activate(self, tenant: Tenant) -> None:
        self.active[tenant.tenant_id] = tenant
        self._shares.enter(tenant.tenant_id, tenant.class_rank)

    def _deactivate(self, tenant: Tenant) -> None:
        if not tenant.has_prompts and self.active.pop(tenant.tenant_id, None) is not None:
            self._shares.leave(tenant.tenant_id)

    def _retire(self, tenant: Tenant) -> None:
        """The tenant is gone: what it has left belongs to the default tenant."""
        if tenant.tenant_id in self.active:
            self._shares.leave(tenant.tenant_id)
        for tenants in (self.tenants, self.active, self.running_tenants):
            tenants.pop(tenant.tenant_id, None)
        heir = self.tenant(DEFAULT_TENANT_ID)
        self.blocks.transfer(tenant.tenant_id, heir.tenant_id)
        for request in (*tenant.running(), *tenant.waiting):
            request.tenant_id = heir.tenant_id
        heir.waiting.extend(tenant.waiting)
        heir.prefilling |= tenant.prefilling
        heir.decoding |= tenant.decoding
        heir.num_running_choices += tenant.num_running_choices
        if heir.num_running:
            self.running_tenants[heir.tenant_id] = heir
        if heir.has_prompts:
            self._activate(heir)
