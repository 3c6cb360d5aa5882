"""Scenario: everything about a simulation but who goes first, so that policies are compared on equal terms."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from evenhand_engine.config import SchedulerSettings, SchedulingPolicy
from evenhand_engine.errors import StartupError
from evenhand_engine.scheduler.scheduler import Scheduler
from evenhand_engine.simulator.device import Device
from evenhand_engine.simulator.published import (
    AdmissionOrder,
    DeficitRoundRobin,
    FirstComeFirstServed,
    LeastCounter,
    PublishedServer,
    RequestsPerMinute,
    oracle,
)
from evenhand_engine.simulator.sidecar import SidecarFaults, SidecarInFront
from evenhand_engine.simulator.simulation import Run, Simulation
from evenhand_engine.simulator.traces import TraceRequest
from evenhand_engine.simulator.workloads import Workload, equal_shares
from evenhand_policy.config import SchedulerConfig

_PUBLISHED: Mapping[str, Callable[[int], AdmissionOrder]] = MappingProxyType(
    {
        "published-fcfs": lambda num_kv_tokens: FirstComeFirstServed(),
        "vtc": lambda num_kv_tokens: LeastCounter(),
        "vtc-oracle": lambda num_kv_tokens: LeastCounter(predict=oracle),
        "lcf": lambda num_kv_tokens: LeastCounter(lift=False),
        "drr": lambda num_kv_tokens: DeficitRoundRobin(num_kv_tokens / 20),
    }
)
SIDECAR = "sidecar"
POLICY_NAMES = (*(str(policy) for policy in SchedulingPolicy), SIDECAR, *_PUBLISHED, "rpm:N")


@dataclass(frozen=True, slots=True)
class Scenario:
    """Requests, policies and a machine.

    Attributes:
        config: of the engine's own scheduler; the published baselines know no policies.
        settings: of the engine's own scheduler; its `scheduling_policy` is set by `run`.
        faults: what is wrong around the sidecar, where one is simulated.
    """

    trace: Sequence[TraceRequest]
    config: SchedulerConfig
    device: Device
    settings: SchedulerSettings
    faults: SidecarFaults = field(default_factory=SidecarFaults)

    @classmethod
    def of_trace(
        cls, trace: Sequence[TraceRequest], device: Device, config: SchedulerConfig | None = None
    ) -> "Scenario":
        """With the device's settings; without `config` every tenant of the trace has weight 1."""
        settings = SchedulerSettings(
            max_num_seqs=device.max_num_seqs,
            max_num_batched_tokens=device.max_num_batched_tokens,
            max_model_len=max(request.num_prompt_tokens + request.num_output_tokens for request in trace),
            num_kv_blocks=device.num_kv_tokens // SchedulerSettings().block_size,
        )
        return cls(trace, config or equal_shares({request.tenant_id for request in trace}), device, settings)

    @classmethod
    def of_workload(cls, workload: Workload, device: Device, seed: int = 0) -> "Scenario":
        """With the workload's own policies."""
        return cls.of_trace(workload.trace(seed), device, workload.config())

    def with_settings(self, **changes: int | bool | float | None) -> "Scenario":
        """The same with other settings of the engine's scheduler."""
        return replace(self, settings=replace(self.settings, **changes))  # type: ignore[arg-type]

    def run(self, policy: str, until: float = float("inf")) -> Run:
        """Simulate under the policy of that name: one of `POLICY_NAMES`, with a number in place of N.

        `fair`, `fcfs` and `static` are the engine's own scheduler, `sidecar` the sidecar's dispatcher before `fcfs`. The others are the published server with all memory
        of the device; they are told the output lengths.

        Raises:
            StartupError: no such policy, or a request can never fit.
        """
        longest = max(request.num_prompt_tokens + request.num_output_tokens for request in self.trace)
        limit = self.settings.max_model_len
        if longest > limit:
            raise StartupError(f"a request of {longest:,} tokens exceeds the context of {limit:,}")
        if policy in list(SchedulingPolicy):
            settings = replace(self.settings, scheduling_policy=SchedulingPolicy(policy))
            scheduler = Scheduler(settings, self.config)
            return Simulation(scheduler, self.device, self.trace, max_model_len=limit).run(until)
        if policy == SIDECAR:
            sidecar = SidecarInFront(self.settings, self.config, self.faults)
            return Simulation(sidecar, self.device, self.trace, max_model_len=limit).run(until)
        memory = self.device.num_kv_tokens
        if longest >= memory:
            raise StartupError(f"a request of {longest:,} tokens never fits into a KV cache of {memory:,}")
        order, door = _published(policy, memory)
        simulation = Simulation(
            PublishedServer(order, memory), self.device, self.trace, max_model_len=limit, lengths_known=True, door=door
        )
        return simulation.run(until)


def is_policy(name: str) -> bool:
    """Whether `Scenario.run` knows the policy."""
    kind, _, limit = name.partition(":")
    return name in POLICY_NAMES[:-1] or (kind == "rpm" and limit.isdecimal() and int(limit) > 0)


def _published(policy: str, num_kv_tokens: int) -> tuple[AdmissionOrder, RequestsPerMinute | None]:
    if not is_policy(policy):
        raise StartupError(f"no scheduling policy {policy!r}; there are {', '.join(POLICY_NAMES)}")
    if policy in _PUBLISHED:
        return _PUBLISHED[policy](num_kv_tokens), None
    return FirstComeFirstServed(), RequestsPerMinute(int(policy.partition(":")[2]))
