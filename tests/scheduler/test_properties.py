"""Random workloads: whatever comes, tokens, blocks and charges are conserved and every request ends once."""

from collections import Counter
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evenhand_engine.config import SchedulerSettings, SchedulingPolicy
from evenhand_engine.scheduler.request import FinishReason, Request
from evenhand_policy.config import (
    Fairness,
    KvCacheShare,
    LatencyClass,
    Limits,
    Prices,
    SchedulerConfig,
    Slo,
    TenantConfig,
)

from .conftest import PretendEngine

TENANTS = ("a", "b", "c")


@st.composite
def tenant_configs(draw: st.DrawFn) -> tuple[TenantConfig, ...]:
    names = draw(st.lists(st.sampled_from(TENANTS), unique=True))
    guarantees = draw(st.lists(st.integers(0, 33), min_size=len(names), max_size=len(names)))
    return tuple(
        TenantConfig(
            tenant_id=name,
            weight=draw(st.integers(1, 9)),
            latency_class=draw(st.sampled_from(LatencyClass)),
            slo=Slo(
                time_to_first_token_ms=draw(st.none() | st.integers(1, 5000)),
                inter_token_latency_ms=draw(st.none() | st.integers(1, 5000)),
            ),
            limits=Limits(
                max_concurrent_requests=draw(st.none() | st.integers(1, 4)),
                queue_timeout_ms=draw(st.none() | st.integers(5_000, 100_000)),
            ),
            kv_cache=KvCacheShare(
                guaranteed_percent=guarantee,
                max_percent=draw(st.integers(guarantee + 1, 100)),
                prefix_sharing_group=draw(st.none() | st.just("group")),
            ),
            fairness=draw(st.sampled_from(Fairness)),
            suspended=draw(st.sampled_from((False, False, False, True))),
        )
        for name, guarantee in zip(sorted(names), guarantees, strict=True)
    )


scheduler_settings = st.builds(
    SchedulerSettings,
    scheduling_policy=st.sampled_from((SchedulingPolicy.FAIR, *SchedulingPolicy)),
    max_num_seqs=st.integers(1, 6),
    max_num_batched_tokens=st.integers(1, 24),
    max_model_len=st.integers(30, 80),
    num_kv_blocks=st.integers(4, 40),
    block_size=st.sampled_from((1, 4)),
    enable_prefix_caching=st.booleans(),
    preemption_lag=st.integers(0, 40),
    min_run_seconds=st.sampled_from((0.0, 5.0)),
    max_preemptions=st.integers(0, 3),
    max_bypasses=st.integers(0, 3),
    growth_blocks=st.sampled_from((0.0, 1.5)),
    min_prefill_tokens=st.integers(1, 4),
    max_refunded_tokens=st.integers(0, 4),
    num_speculative_tokens=st.sampled_from((0, 1, 4)),
)

operations = st.lists(
    st.one_of(
        st.tuples(
            st.just("add"),
            st.sampled_from((*TENANTS, "unknown")),
            st.integers(1, 29),  # prompt
            st.integers(1, 25),  # output
            st.integers(0, 3),  # shared prompt, or user
        ),
        st.tuples(st.just("abort"), st.integers(0, 50), st.none() | st.integers(0, 3)),
        st.tuples(st.just("reconfigure"), tenant_configs()),
        st.tuples(st.just("step"), st.integers(1, 6)),
    ),
    max_size=60,
)


@dataclass
class Ledger:
    """What should have been charged, reckoned from the batches alone."""

    computed: dict[str, set[int]] = field(default_factory=dict)  # prompt positions, first time
    num_outputs: Counter[str] = field(default_factory=Counter)
    num_batches: int = 0
    context_price: int = 0

    def read(self, engine: PretendEngine) -> None:
        first = self.num_batches
        for batch, owners, outputs in zip(
            engine.batches[first:], engine.owners[first:], engine.given[first:], strict=True
        ):
            assert 0 < batch.num_tokens <= engine.settings.max_num_batched_tokens
            assert len(batch.scheduled) <= engine.settings.max_num_seqs
            assert len({item.seat for item in batch.scheduled}) == len(batch.scheduled)
            for item, request, num_outputs in zip(batch.scheduled, owners, outputs, strict=True):
                end = item.num_computed_tokens + item.num_scheduled_tokens
                computed = self.computed.setdefault(request.request_id, set(range(request.num_cached_tokens)))
                computed |= set(range(item.num_computed_tokens, min(end, request.num_prompt_tokens)))
                self.num_outputs[request.request_id] += num_outputs
        self.num_batches = len(engine.batches)

    def service(self, request: Request, num_counted_outputs: int) -> int:
        computed = self.computed.get(request.request_id, set())
        cached = min(request.num_cached_tokens, request.num_prompt_tokens) if computed else 0
        service = len(computed) - cached + 2 * num_counted_outputs
        for position in computed - set(range(cached)):
            service += self.context_cost(position)
        for number in range(1, num_counted_outputs):  # the first one is computed from the prompt's last token
            service += self.context_cost(request.num_prompt_tokens + number - 1)
        return service

    def context_cost(self, position: int) -> int:
        """Of the token at `position`: what is owed up to and with it, less what was owed before."""
        owed_before, owed = (sum(range(end)) * self.context_price // 1000 for end in (position, position + 1))
        return owed - owed_before


def run_operation(engine: PretendEngine, operation: tuple, kept: dict[str, int]) -> None:
    match operation:
        case ("add", tenant_id, prompt, output, shared):
            token_ids = list(range(50, 50 + prompt)) if shared == 0 else None
            engine.add(tenant_id, prompt, output, max_tokens=output + 2, prompt=token_ids, user=str(shared))
        case ("abort", index, num_output_tokens) if engine.requests:
            request = list(engine.requests.values())[index % len(engine.requests)]
            if request.finish_reason is None:
                reason = FinishReason.ABORT if num_output_tokens is None else FinishReason.STOP
                engine.scheduler.abort(request.request_id, reason, num_output_tokens)
                if num_output_tokens is not None:
                    most = engine.settings.max_refunded_tokens
                    kept[request.request_id] = max(
                        min(num_output_tokens, request.num_output_tokens), request.num_output_tokens - most
                    )
        case ("reconfigure", tenants):
            engine.scheduler.reconfigure(SchedulerConfig(tenants=tenants, prices=engine.scheduler.config.prices))
        case ("step", count):
            engine.run(count)


def check_whatever_comes(
    scheduler_settings: SchedulerSettings,
    tenants: tuple[TenantConfig, ...],
    operations: list,
    depth: int,
    context_price: int,
    period: int,
) -> None:
    if depth > 1:  # drafts need the tokens before them
        scheduler_settings = replace(scheduler_settings, num_speculative_tokens=0)
    prices = Prices(context_token=context_price)
    engine = PretendEngine(scheduler_settings, tenants, prices=prices, depth=depth, check_kv=True, period=period)
    ledger, kept = Ledger(context_price=context_price), {}
    for operation in (*operations, ("reconfigure", ()), ("step", 1)):
        run_operation(engine, operation, kept)
        engine.scheduler.request_table.check_integrity()
        ledger.read(engine)
    engine.drain()
    engine.scheduler.request_table.check_integrity()
    ledger.read(engine)
    assert engine.scheduler.request_table.blocks.num_free_blocks == scheduler_settings.num_kv_blocks
    expected_service = 0
    for request in engine.requests.values():
        assert engine.finish_reason(request) is request.finish_reason is not None
        token_ids = engine.token_ids(request)
        assert token_ids == [engine.token(request, index) for index in range(len(token_ids))]
        if request.finish_reason is FinishReason.STOP and request.request_id not in kept:
            assert len(token_ids) == engine.num_output_tokens(request)
        if request.request_id in kept:
            counted = kept[request.request_id]
        elif request.finish_reason is FinishReason.STOP:
            counted = len(token_ids)
        else:
            counted = ledger.num_outputs[request.request_id]
        expected_service += ledger.service(request, counted)
    assert engine.charged == expected_service


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    scheduler_settings,
    tenant_configs(),
    operations,
    st.integers(1, 2),
    st.sampled_from((0, 50)),
    st.sampled_from((0, 2)),
)
def test_whatever_comes(
    scheduler_settings: SchedulerSettings,
    tenants: tuple[TenantConfig, ...],
    operations: list,
    depth: int,
    context_price: int,
    period: int,
) -> None:
    check_whatever_comes(scheduler_settings, tenants, operations, depth, context_price, period)


@pytest.mark.soak
@pytest.mark.timeout(7200)
@settings(max_examples=20_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    scheduler_settings,
    tenant_configs(),
    operations,
    st.integers(1, 2),
    st.sampled_from((0, 50)),
    st.sampled_from((0, 2)),
)
def test_whatever_comes_for_long(
    scheduler_settings: SchedulerSettings,
    tenants: tuple[TenantConfig, ...],
    operations: list,
    depth: int,
    context_price: int,
    period: int,
) -> None:
    check_whatever_comes(scheduler_settings, tenants, operations, depth, context_price, period)
