"""Shared by the scheduler's tests: a scheduler with a pretended model, in virtual time."""

from collections import deque
from collections.abc import Callable, Iterable

import pytest

from evenhand_engine.config import SchedulerSettings
from evenhand_engine.scheduler.batch import Batch
from evenhand_engine.scheduler.request import FinishReason, Request, RequestOutput, Sampled, SamplingParams
from evenhand_engine.scheduler.scheduler import Scheduler
from evenhand_engine.scheduler.step_time import shape_of
from evenhand_engine.simulator.device import LinearStepTime
from evenhand_policy.config import Prices, SchedulerConfig, TenantConfig

EOS = 2


class PretendEngine:
    """Runs a Scheduler in virtual time: a step takes `step_seconds`, and a request's next token is a function of its
    position alone, as a real model's greedy tokens are, so that recompute must reproduce it."""

    def __init__(
        self,
        settings: SchedulerSettings,
        tenants: Iterable[TenantConfig] = (),
        *,
        prices: Prices | None = None,
        depth: int = 1,
        check_kv: bool = False,
        period: int = 0,
    ) -> None:
        """`period`: outputs repeat after so many tokens, but for every eleventh; 0: they never repeat. `depth`: batches submitted before the first is taken in. `check_kv`: keep a pretended KV cache and assert
        that every token finds the keys and values of exactly the tokens before it (slow)."""
        self.settings = settings
        self.check_kv = check_kv
        self.period = period
        self.scheduler = Scheduler(settings, SchedulerConfig(tenants=tuple(tenants), prices=prices or Prices()))
        self.depth = depth
        self.charged = 0
        self._charge = self.scheduler.ledger.shares.charge
        self.scheduler.ledger.shares.charge = self._count_charge  # type: ignore[method-assign]
        self.now = 0.0
        self.step_seconds = 1.0
        self.step_time: LinearStepTime | None = None  # instead of `step_seconds`: by what the step computes
        self.outputs: dict[str, list[RequestOutput]] = {}
        self.requests: dict[str, Request] = {}
        self.batches: list[Batch] = []
        self.owners: list[list[Request]] = []  # whose the items of each batch were
        self.given: list[list[int]] = []  # how many outputs each item of each batch gave
        self._num_output_tokens: dict[str, int] = {}  # where a request says EOS
        self._in_flight: deque[list[Sampled]] = deque()
        self._seats: dict[int, Request] = {}
        self._block_tables: dict[int, list[int]] = {}  # by seat, as a runner knows them: from batches alone
        self._kv: dict[int, tuple[str, tuple[int, ...]]] = {}  # slot: (salt, all tokens up to its own)

    def add(
        self,
        tenant_id: str,
        num_prompt_tokens: int,
        num_output_tokens: int,
        *,
        max_tokens: int | None = None,
        prompt: list[int] | None = None,
        user: str = "",
    ) -> Request:
        number = len(self.requests) + 1
        request = Request(
            f"{tenant_id}-{number}",
            tenant_id,
            prompt or [number * 1000 + index for index in range(num_prompt_tokens)],
            SamplingParams(max_tokens=max_tokens or num_output_tokens, stop_token_ids=frozenset({EOS})),
            self.now,
            user=user,
        )
        self._num_output_tokens[request.request_id] = num_output_tokens
        self.requests[request.request_id] = request
        self.scheduler.add(request, self.now)
        return request

    def keep(self, tenant_id: str, count: int, num_prompt_tokens: int, num_output_tokens: int) -> None:
        """Add requests until the tenant has `count` of them in the engine: a closed loop."""
        live = sum(request.tenant_id == tenant_id for request in self.scheduler.request_table.requests.values())
        for _ in range(count - live):
            self.add(tenant_id, num_prompt_tokens, num_output_tokens)

    def token(self, request: Request, index: int) -> int:
        """The request's output token number `index`, counted from 0."""
        if index + 1 >= self._num_output_tokens[request.request_id]:
            return EOS
        return 100 + (index % self.period if self.period and index % 11 != 10 else index)

    def step(self) -> Batch | None:
        """Submit one batch, and take in the oldest one when the pipeline is full or there is nothing to submit."""
        batch = self.scheduler.step(self.now)
        if batch is not None:
            self.batches.append(batch)
            self._take_seats(batch)
            self.owners.append([self._seats[item.seat] for item in batch.scheduled])
            if self.check_kv:
                self._compute(batch)
            self._in_flight.append(self.sample(batch))
        self.now += self.step_time.seconds(shape_of(batch)) if self.step_time and batch else self.step_seconds
        if len(self._in_flight) >= self.depth or (batch is None and self._in_flight):
            self._record(self.scheduler.update(self._in_flight.popleft(), self.now))
        self._record(self.scheduler.collect())
        return batch

    def sample(self, batch: Batch) -> list[Sampled]:
        """What the pretended model gives the last batch."""
        results, given = [], []
        for item in batch.scheduled:
            request, end = self._seats[item.seat], item.num_computed_tokens + item.num_scheduled_tokens
            first = end - item.num_samples + 1 - request.num_prompt_tokens
            token_ids: list[int] = []
            for number in range(item.num_samples):
                if number and token_ids[-1] != item.draft_token_ids[number - 1]:
                    break  # what follows was computed from a wrong draft
                token_ids.append(self.token(request, first + number))
            given.append(min(len(token_ids), max(1, self.num_output_tokens(request) - first)))
            if item.num_samples:
                results.append(Sampled(tuple(token_ids)))
        self.given.append(given)
        return results

    def run(self, num_steps: int, before_step: Callable[[], None] = lambda: None) -> None:
        for _ in range(num_steps):
            before_step()
            self.step()

    def drain(self, max_steps: int = 100_000) -> None:
        """Step until no request is left."""
        for _ in range(max_steps):
            if not self.scheduler.request_table.requests and not self._in_flight:
                return
            self.step()
        raise AssertionError(f"not drained: {list(self.scheduler.request_table.requests.values())[:5]}")

    def service(self, tenant_id: str) -> int:
        return self.scheduler.request_table.tenant(tenant_id).service

    def services(self, num_steps: int, before_step: Callable[[], None]) -> dict[str, int]:
        """What each tenant is served in the next steps."""
        before = {tenant_id: tenant.service for tenant_id, tenant in self.scheduler.request_table.tenants.items()}
        self.run(num_steps, before_step)
        return {i: tenant.service - before.get(i, 0) for i, tenant in self.scheduler.request_table.tenants.items()}

    def num_output_tokens(self, request: Request) -> int:
        """How many output tokens the request has by itself, the end of sequence included."""
        return self._num_output_tokens[request.request_id]

    def finish_reason(self, request: Request) -> FinishReason | None:
        reasons = [output.finish_reason for output in self.outputs.get(request.request_id, []) if output.finish_reason]
        assert len(reasons) <= 1, f"{request} ended {len(reasons)} times"
        return reasons[0] if reasons else None

    def token_ids(self, request: Request) -> list[int]:
        return [token for output in self.outputs.get(request.request_id, []) for token in output.token_ids]

    def _count_charge(self, account: str, cost: int, weight: int) -> None:
        self.charged += cost
        self._charge(account, cost, weight)

    def _take_seats(self, batch: Batch) -> None:
        for started in batch.started:
            request = self._seats[started.seat] = self.requests[started.request_id]
            assert started.token_ids == request.token_ids and started.num_prompt_tokens == request.num_prompt_tokens
            self._block_tables[started.seat] = []
        for number, item in enumerate(batch.scheduled):
            self._block_tables[item.seat] += item.new_block_ids
            is_decode = item.num_computed_tokens >= self._seats[item.seat].num_prompt_tokens
            assert is_decode or number >= batch.num_decodes, "a prompt's chunk is among the decodes"

    def _compute(self, batch: Batch) -> None:
        """Write the batch's keys and values, then let every item read its context, as a runner does layer by layer."""
        size = self.settings.block_size
        for reads in (False, True):
            for item in batch.scheduled:
                request, end = self._seats[item.seat], item.num_computed_tokens + item.num_scheduled_tokens
                num_drafts = len(item.draft_token_ids)
                outputs = (self.token(request, index) for index in range(end - request.num_prompt_tokens))
                token_ids = (*request.token_ids[: request.num_prompt_tokens], *outputs)[: end - num_drafts]
                token_ids += item.draft_token_ids
                for position in range(0 if reads else item.num_computed_tokens, end):
                    slot = self._block_tables[item.seat][position // size] * size + position % size
                    content = (request.cache_salt, token_ids[: position + 1])
                    if reads:
                        assert self._kv.get(slot) == content, f"{request}: wrong keys and values at {position}"
                    else:
                        self._kv[slot] = content

    def _record(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            assert self.finish_reason(self.requests[output.request_id]) is None, "an output after the end"
            self.outputs.setdefault(output.request_id, []).append(output)


@pytest.fixture
def pretend_engine() -> type[PretendEngine]:
    return PretendEngine
