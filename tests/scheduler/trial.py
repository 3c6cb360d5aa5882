"""Trial: floods of tenants in virtual time, and what each got of the engine, by the tokens that came out."""

from collections import Counter
from dataclasses import dataclass, field
from itertools import permutations

from evenhand_engine.config import SchedulerSettings
from evenhand_engine.scheduler.batch import Batch
from evenhand_engine.simulator.device import LinearStepTime
from evenhand_policy.config import (
    Fairness,
    SchedulerConfig,
    TenantConfig,
)

from .conftest import PretendEngine

INPUT_PRICE, OUTPUT_PRICE = 1, 2
CHUNK, SEATS, LAG = 32, 16, 48
LONGEST = 128  # tokens of a request
LONGEST_PROMPT, LONGEST_OUTPUT = 60, 60
STEP_TIME = LinearStepTime(0.1, per_token=0.01, per_decode_context=1e-3)  # a full step takes a second and more
USERS = ("ann", "bob", "eve")


@dataclass(frozen=True)
class Flood:
    """What one tenant sends: it keeps `num_requests` in the engine, split among `num_users`."""

    num_requests: int
    num_prompt_tokens: int
    num_output_tokens: int
    num_users: int = 1


class Meter:
    """What everybody received, by the batches alone: each prompt token once, each output token as it is computed."""

    def __init__(self, engine: PretendEngine) -> None:
        self.by_tenant: Counter[str] = Counter()
        self.by_user: Counter[tuple[str, str]] = Counter()
        self._engine = engine
        self._computed: dict[str, int] = {}  # prompt tokens of each request, as far as they were ever computed
        self._num_batches = 0

    def read(self) -> None:
        first = self._num_batches
        engine = self._engine
        for batch, owners, outputs in zip(
            engine.batches[first:], engine.owners[first:], engine.given[first:], strict=True
        ):
            for item, request, num_outputs in zip(batch.scheduled, owners, outputs, strict=True):
                known = self._computed.get(request.request_id, request.num_cached_tokens)
                end = min(item.num_computed_tokens + item.num_scheduled_tokens, request.num_prompt_tokens)
                self._computed[request.request_id] = max(known, end)
                service = max(0, end - known) * INPUT_PRICE + num_outputs * OUTPUT_PRICE
                service += context_cost(engine, known, end)
                sampled_from = item.num_computed_tokens + item.num_scheduled_tokens - item.num_samples
                service += context_cost(engine, max(end, sampled_from), sampled_from + num_outputs)
                self.by_tenant[request.tenant_id] += service
                self.by_user[request.tenant_id, request.user] += service
        self._num_batches = len(self._engine.batches)


def context_cost(engine: PretendEngine, start: int, end: int) -> int:
    """Of tokens at the positions [start, end): each attends to all before it."""
    price = engine.scheduler.config.prices.context_token
    return price * (end * (end - 1) // 2) // 1000 - price * (start * (start - 1) // 2) // 1000 if start < end else 0


class Rise:
    """The most by which a difference has risen above any of its earlier values."""

    def __init__(self) -> None:
        self.most = 0.0
        self.restart()

    def restart(self) -> None:
        self._least = float("inf")

    def take(self, value: float) -> None:
        self._least = min(self._least, value)
        self.most = max(self.most, value - self._least)


def is_backlogged(engine: PretendEngine, batch: Batch | None, config: TenantConfig, *, is_held: bool) -> bool:
    """Whether the step just planned left out work of the tenant that its own limits would have let start.

    Asked before the step's results are known: what ends with it still counts against a limit. A stream that had to
    wait its turn is work left out too; one that pauses since its tenant is too far ahead is not.
    """
    request_table = engine.scheduler.request_table
    tenant = request_table.tenants.get(config.tenant_id)
    if tenant is None:
        return False
    seats = {item.seat for item in batch.scheduled} if batch else set()
    if not is_held and any(not r.is_at_end and r.seat not in seats for r in tenant.decoding.values()):
        return True
    if not len(tenant.waiting):
        return False
    most_running = config.limits.max_concurrent_requests
    if most_running is not None and tenant.num_running >= most_running:
        return False
    if tenant.prefilling or config.kv_cache.max_percent == 100:
        return True
    head = tenant.next_prompt()
    assert head is not None
    most_blocks = engine.settings.num_kv_blocks * config.kv_cache.max_percent // 100
    num_needed = -(-head.num_tokens // engine.settings.block_size)
    return request_table.blocks.num_held_blocks(config.tenant_id) + num_needed <= most_blocks


def settings_for(num_kv_blocks: int = 100, **changes: object) -> SchedulerSettings:
    """Without exemptions: whatever runs may be preempted for who is behind."""
    defaults: dict[str, object] = {
        "max_num_batched_tokens": CHUNK,
        "max_num_seqs": SEATS,
        "max_model_len": LONGEST,
        "num_kv_blocks": num_kv_blocks,
        "block_size": 4,
        "preemption_lag": LAG,
        "min_run_seconds": 0.0,
        "max_preemptions": 1 << 20,
        "enable_prefix_caching": False,
    }
    return SchedulerSettings(**(defaults | changes))  # type: ignore[arg-type]


@dataclass
class Trial:
    """A workload on an engine, with what it showed.

    Attributes:
        rises: of each ordered pair of tenants, the difference of weighted services while both were backlogged.
        user_rises: the same of each tenant's users, by (tenant, user, user).
        worst: the largest rise as a share of its bound.
    """

    engine: PretendEngine
    configs: dict[str, TenantConfig]
    floods: dict[str, Flood]
    exempt: float = 0.0
    rises: dict[tuple[str, str], Rise] = field(default_factory=dict)
    user_rises: dict[tuple[str, str, str], Rise] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.meter = Meter(self.engine)
        self._lightest = min(config.weight for config in self.configs.values())
        self._was_backlogged: set[str] = set()
        self._backlogged: set[str] = set()
        self._worst_before = 0.0  # under earlier weights
        plan, resume = self.engine.scheduler.step, self.engine.scheduler._preemption.resume
        held: set[str] = set()

        def planned(now: float) -> Batch | None:
            held.clear()
            batch = plan(now)
            self._backlogged = {
                name
                for name, config in self.configs.items()
                if is_backlogged(self.engine, batch, config, is_held=name in held)
            }
            return batch

        def resumed() -> None:
            held.update(name for name, tenant in self.engine.scheduler.request_table.tenants.items() if tenant.paused)
            resume()

        self.engine.scheduler.step = planned  # type: ignore[method-assign]
        self.engine.scheduler._preemption.resume = resumed  # type: ignore[method-assign]

    def run(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self._send()
            self.engine.step()
            self.meter.read()
            self._compare()

    def reconfigure(self, configs: dict[str, TenantConfig]) -> None:
        """Another config: what was received is counted anew under its weights, the bound is that of the lightest.

        What was seen before is judged by the weights that it was seen under.
        """
        self._worst_before = self.worst
        self.configs = configs
        self.engine.scheduler.reconfigure(
            SchedulerConfig(tenants=tuple(configs.values()), prices=self.engine.scheduler.config.prices)
        )
        self._lightest = min(self._lightest, *(config.weight for config in configs.values()))
        self.rises.clear()
        for rise in self.user_rises.values():
            rise.restart()

    def bound(self, *weights: int) -> float:
        """Most by which the weighted service of one of two backlogged tenants may run ahead; docs/fairness.md."""
        slack = CHUNK * OUTPUT_PRICE + self.step_context
        lead = slack + (LONGEST * INPUT_PRICE + self.longest_context + LAG) / self._lightest
        seats, num_drafts = self.engine.settings.max_num_seqs, self.engine.settings.num_speculative_tokens
        num_outputs = max(seats, min(CHUNK, seats * (1 + num_drafts)))
        step = CHUNK * INPUT_PRICE + num_outputs * OUTPUT_PRICE + self.step_context
        return sum(lead + (step + self.exempt) / weight for weight in weights)

    @property
    def longest_context(self) -> float:
        """What the longest request owes for its context."""
        return context_cost(self.engine, 0, LONGEST)

    @property
    def step_context(self) -> float:
        """The same of one step: each token attends to less than the longest request, and is rounded by a request."""
        price = self.engine.scheduler.config.prices.context_token
        return price * CHUNK * LONGEST / 1000 + self.engine.settings.max_num_seqs * (price > 0)

    @property
    def user_bound(self) -> float:
        """The same for two users of one tenant: nothing of a user is preempted for another one."""
        num_outputs = SEATS if not self.engine.settings.num_speculative_tokens else CHUNK
        step = CHUNK * INPUT_PRICE + num_outputs * OUTPUT_PRICE + self.step_context
        return 2.0 * (step + SEATS * (LONGEST * OUTPUT_PRICE + self.longest_context))

    @property
    def worst(self) -> float:
        now = (
            rise.most / self.bound(self.configs[first].weight, self.configs[second].weight)
            for (first, second), rise in self.rises.items()
        )
        return max(self._worst_before, *now, 0.0)

    @property
    def worst_of_users(self) -> float:
        return max((rise.most / self.user_bound for rise in self.user_rises.values()), default=0.0)

    def _send(self) -> None:
        live = Counter((r.tenant_id, r.user) for r in self.engine.scheduler.request_table.requests.values())
        for name, flood in self.floods.items():
            if self.configs[name].suspended:
                continue
            users = USERS[: flood.num_users]
            for user in users:
                for _ in range(-(-flood.num_requests // len(users)) - live[name, user]):
                    self.engine.add(name, flood.num_prompt_tokens, flood.num_output_tokens, user=user)

    def _compare(self) -> None:
        backlogged = self._backlogged
        for pair in permutations(self.configs, 2):
            rise = self.rises.setdefault(pair, Rise())
            if not self._was_backlogged.issuperset(pair):
                rise.restart()
            if backlogged.issuperset(pair):
                first, second = (self.meter.by_tenant[name] / self.configs[name].weight for name in pair)
                rise.take(first - second)
        self._was_backlogged = backlogged
        for name, flood in self.floods.items():
            if self.configs[name].fairness is Fairness.PER_USER and name in backlogged:
                waiting = {request.user for request in self.engine.scheduler.request_table.tenants[name].waiting}
                for one, other in permutations(USERS[: flood.num_users], 2):
                    rise = self.user_rises.setdefault((name, one, other), Rise())
                    if {one, other} <= waiting:
                        rise.take(float(self.meter.by_user[name, one] - self.meter.by_user[name, other]))
                    else:
                        rise.restart()
