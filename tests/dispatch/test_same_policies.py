"""What a policy means is the same in the engine and in a sidecar: one body of each test, before either."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest

from evenhand_engine.config import SchedulerSettings
from evenhand_engine.scheduler.request import FinishReason, Request, RequestOutput, Sampled, SamplingParams
from evenhand_engine.scheduler.scheduler import Scheduler
from evenhand_engine.scheduler.step_time import shape_of
from evenhand_engine.simulator.device import Device, LinearStepTime
from evenhand_engine.simulator.sidecar import SidecarInFront
from evenhand_policy.config import Fairness, LatencyClass, Limits, SchedulerConfig, TenantConfig

DEVICE = Device("test", 20_000, LinearStepTime(0.02, per_prefill_token=5e-5, per_decode_token=2e-5))
SETTINGS = SchedulerSettings(max_num_batched_tokens=1_024, max_num_seqs=64, num_kv_blocks=1_250, max_model_len=8_192)


class Either:
    """The engine's scheduler, or a sidecar's dispatcher before a first-come-first-served engine, in virtual time.

    Attributes:
        first_tokens: when each request's first token came, in that order.
        num_tokens: outputs of each request so far.
        reasons: why each ended.
    """

    def __init__(self, kind: str, *tenants: TenantConfig, max_num_seqs: int = 64) -> None:
        settings, config = replace(SETTINGS, max_num_seqs=max_num_seqs), SchedulerConfig(tenants=tenants)
        self._driven: Scheduler | SidecarInFront
        if kind == "engine":
            self._driven = self._decides = Scheduler(settings, config)
        else:
            self._driven = SidecarInFront(settings, config)
            self._decides = self._driven.dispatcher
            self._decides.window.num_seats = max_num_seqs
        self.now = 0.0
        self.first_tokens: dict[str, float] = {}
        self.num_tokens = Counter[str]()
        self.reasons: dict[str, FinishReason] = {}
        self._num_requests = 0

    def add(self, tenant_id: str, prompt: int = 100, output: int = 50, user: str = "", priority: int = 0) -> str:
        """A request that comes now; returns its id."""
        number = self._num_requests = self._num_requests + 1
        request_id = f"{tenant_id}-{user}-{number}"
        tokens = [number * 10_000 + index for index in range(prompt)]
        params = SamplingParams(max_tokens=output)
        request = Request(request_id, tenant_id, tokens, params, self.now, user=user, priority=priority)
        self._driven.add(request, self.now)
        return request_id

    def reconfigure(self, *tenants: TenantConfig) -> None:
        self._decides.reconfigure(SchedulerConfig(tenants=tenants))

    def run(self, seconds: float) -> None:
        until = self.now + seconds
        while self.now < until:
            batch = self._driven.step(self.now)
            if batch is None:
                self.now += 0.01
                self._hear(self._driven.collect())
                continue
            self.now += DEVICE.seconds(shape_of(batch))
            num_sampled = sum(item.num_samples > 0 for item in batch.scheduled)
            self._hear(self._driven.update([Sampled((0,))] * num_sampled, self.now))

    def order(self, part: Callable[[str], str] = lambda request_id: request_id) -> list[str]:
        """Requests, or a part of their ids, in the order of their first tokens."""
        return [part(request_id) for request_id in self.first_tokens]

    def served(self, part: int = 0) -> Counter[str]:
        """Output tokens by tenant, or by another part of the ids."""
        found = Counter[str]()
        for request_id, num_tokens in self.num_tokens.items():
            found[request_id.split("-")[part]] += num_tokens
        return found

    def _hear(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            if output.token_ids:
                self.first_tokens.setdefault(output.request_id, self.now)
                self.num_tokens[output.request_id] += len(output.token_ids)
            if output.finish_reason is not None:
                assert output.request_id not in self.reasons, "it ended twice"
                self.reasons[output.request_id] = output.finish_reason


@pytest.fixture(params=["engine", "sidecar"])
def either(request: pytest.FixtureRequest) -> Callable[..., Either]:
    return lambda *tenants, **options: Either(request.param, *tenants, **options)


def owner(request_id: str) -> str:
    return request_id.split("-")[0]


@pytest.mark.parametrize("weight", [1, 3])
def test_backlogged_tenants_share_by_weight(either: Callable[..., Either], weight: int) -> None:
    front = either(TenantConfig(tenant_id="a", weight=weight), TenantConfig(tenant_id="b"), max_num_seqs=8)
    for _ in range(600):
        front.add("a")
        front.add("b")
    front.run(5.0)
    before = front.served()
    front.run(40.0)
    assert (served := front.served() - before)["a"] / served["b"] == pytest.approx(weight, rel=0.15)


def test_silence_earns_nothing(either: Callable[..., Either]) -> None:
    front = either(TenantConfig(tenant_id="a"), TenantConfig(tenant_id="b"), max_num_seqs=8)
    for _ in range(600):
        front.add("b")
    front.run(20.0)
    for _ in range(300):
        front.add("a")
    front.run(2.0)
    before = front.served()
    front.run(20.0)
    assert (served := front.served() - before)["a"] / served["b"] == pytest.approx(1.0, rel=0.15)


def test_a_higher_class_goes_first_inside_the_slack(either: Callable[..., Either]) -> None:
    chat = TenantConfig(tenant_id="chat", latency_class=LatencyClass.INTERACTIVE)
    front = either(TenantConfig(tenant_id="batch", latency_class=LatencyClass.BATCH), chat, max_num_seqs=2)
    running = {front.add("batch") for _ in range(2)}
    front.run(0.2)
    for tenant_id in ("batch", "batch", "chat", "chat"):
        front.add(tenant_id)
    front.run(30.0)
    assert [owner(one) for one in front.order() if one not in running] == ["chat", "chat", "batch", "batch"]


def test_users_of_one_tenant_share_it_evenly(either: Callable[..., Either]) -> None:
    front = either(TenantConfig(tenant_id="team", fairness=Fairness.PER_USER), max_num_seqs=8)
    for _ in range(400):
        front.add("team", user="greedy")
    for _ in range(100):
        front.add("team", user="modest")
    front.run(20.0)
    served = front.served(part=1)
    assert served["modest"] / served["greedy"] == pytest.approx(1.0, rel=0.15)


def test_priorities_order_a_tenants_own_requests_and_nobody_elses(either: Callable[..., Either]) -> None:
    front = either(TenantConfig(tenant_id="a", fairness=Fairness.PRIORITY), TenantConfig(tenant_id="b"), max_num_seqs=1)
    front.add("b")
    front.run(0.1)
    asked = {front.add("a", priority=priority): priority for priority in (5, -5, 0)}
    others = [front.add("b", priority=priority) for priority in (9, -9)]
    front.run(60.0)
    assert [asked[one] for one in front.order() if one in asked] == [-5, 0, 5]
    assert [one for one in front.order() if one in others] == others


def test_a_concurrency_limit_holds_its_tenant_back_and_nobody_else(either: Callable[..., Either]) -> None:
    front = either(TenantConfig(tenant_id="a", limits=Limits(max_concurrent_requests=1)))
    first, second, other = front.add("a"), front.add("a"), front.add("default")
    front.run(0.5)
    assert set(front.order()) == {first, other}
    front.run(10.0)
    assert second in front.first_tokens and set(front.reasons.values()) == {FinishReason.LENGTH}


def test_whoever_waits_too_long_leaves_unserved(either: Callable[..., Either]) -> None:
    limits = Limits(max_concurrent_requests=1, queue_timeout_ms=2_000)
    front = either(TenantConfig(tenant_id="a", limits=limits))
    running, queued = front.add("a", output=400), front.add("a")
    front.run(1.5)
    assert queued not in front.reasons
    front.run(1.0)
    assert front.reasons == {queued: FinishReason.QUEUE_TIMEOUT}
    front.run(20.0)
    assert front.reasons[running] is FinishReason.LENGTH and front.order() == [running]


def test_suspension_ends_what_is_queued_and_serves_what_ran(either: Callable[..., Either]) -> None:
    limits = Limits(max_concurrent_requests=1)
    front = either(TenantConfig(tenant_id="a", limits=limits))
    running, queued = front.add("a"), front.add("a")
    front.run(0.5)
    front.reconfigure(TenantConfig(tenant_id="a", limits=limits, suspended=True))
    late = front.add("a")
    front.run(10.0)
    assert front.reasons == {
        running: FinishReason.LENGTH,
        queued: FinishReason.TENANT_SUSPENDED,
        late: FinishReason.TENANT_SUSPENDED,
    }


def test_a_tenant_of_no_policy_waits_in_the_line_of_all_such(either: Callable[..., Either]) -> None:
    front = either(TenantConfig(tenant_id="a"), max_num_seqs=8)
    for _ in range(300):
        front.add("a")
        front.add("unknown")
        front.add("another")
    front.run(5.0)
    before = front.served()
    front.run(20.0)
    served = front.served() - before
    assert served["a"] / (served["unknown"] + served["another"]) == pytest.approx(1.0, rel=0.15)
