"""Tenant: the live state of one tenant in the scheduler."""

from collections.abc import Iterable, Iterator

from evenhand_engine.scheduler.request import Request
from evenhand_engine.scheduler.tenant_queue import TenantQueue
from evenhand_policy.config import Enforcement, LatencyClass, TenantConfig

_CLASS_RANK = {latency_class: rank for rank, latency_class in enumerate(LatencyClass)}
_NEVER = float("inf")


class Tenant:
    """Queue, running requests and counters of one tenant, with its config resolved for this engine.

    Attributes:
        waiting: requests without KV blocks.
        prefilling: running requests whose prompt (or recompute) is not finished, in order of admission, by id.
        decoding: running requests that generate, by id; where there is no room for all, those whose turn comes first.
        service: cost of everything computed for the tenant, in units of price. Grows only.
        num_running_choices: answers that running requests compute at once.
        paused: running requests that may not compute in this step, since the tenant is too far ahead.
        num_bypasses: requests of others admitted past the head of the queue while it lacked memory.
    """

    def __init__(self, config: TenantConfig, *, num_kv_blocks: int, num_replicas: int) -> None:
        self.prefilling: dict[str, Request] = {}
        self.decoding: dict[str, Request] = {}
        self.paused: dict[str, Request] = {}
        self.service = 0
        self.num_running_choices = 0
        self.num_bypasses = 0
        self.num_preemptions = 0
        self.num_prompt_tokens = 0
        self.num_generation_tokens = 0
        self.waiting = TenantQueue(config.fairness)
        self.configure(config, num_kv_blocks=num_kv_blocks, num_replicas=num_replicas)

    def configure(self, config: TenantConfig, *, num_kv_blocks: int, num_replicas: int) -> None:
        """Enforce another config from now on; requests and counters stay."""
        enforced = config.enforcement is Enforcement.ENFORCE
        limits = config.limits
        self.config = config
        self.tenant_id = config.tenant_id
        self.weight = config.weight
        self.class_rank = _CLASS_RANK[config.latency_class]
        self.time_to_first_token = _seconds(config.slo.time_to_first_token_ms)
        self.inter_token_latency = _seconds(config.slo.inter_token_latency_ms)
        self.queue_timeout = _seconds(limits.queue_timeout_ms if enforced else None)
        concurrent = limits.max_concurrent_requests if enforced else None
        self.max_running = _NEVER if concurrent is None else -(-concurrent // num_replicas)
        self.max_blocks = max(1, num_kv_blocks * config.kv_cache.max_percent // 100)
        group = config.kv_cache.prefix_sharing_group
        self.cache_salt = f"group {group}" if group else f"tenant {config.tenant_id} {config.uid}"
        if config.fairness is not self.waiting.fairness:
            queue = TenantQueue(config.fairness)
            queue.extend(self.waiting)
            self.waiting = queue

    @property
    def is_suspended(self) -> bool:
        return self.config.suspended and self.config.enforcement is Enforcement.ENFORCE

    @property
    def num_running(self) -> int:
        """Requests with KV blocks."""
        return len(self.prefilling) + len(self.decoding)

    def running(self) -> Iterator[Request]:
        """Requests with KV blocks: those that prefill, then those that decode."""
        yield from self.prefilling.values()
        yield from self.decoding.values()

    def in_progress(self) -> Iterable[Request]:
        """Prompts in progress that may go on in this step, in order of admission."""
        if not self.paused:
            return self.prefilling.values()
        return [request for request_id, request in self.prefilling.items() if request_id not in self.paused]

    def decodes(self) -> list[Request]:
        """Streams that may compute their next token in this step, the one that has waited longest first."""
        # `is_at_end`, but without a call for each stream in each step
        streams = [r for r in self.decoding.values() if r.num_computed_tokens + 1 < r.max_num_tokens]
        paused = self.paused
        return [request for request in streams if request.request_id not in paused] if paused else streams

    def end_turns(self, requests: Iterable[Request]) -> None:
        """These streams computed a token while others had to wait: theirs is the last turn now."""
        for request in requests:
            self.decoding[request.request_id] = self.decoding.pop(request.request_id)

    @property
    def deadline(self) -> float:
        """When its next prompt should give its first token; infinite without an objective."""
        if self.time_to_first_token == _NEVER:
            return _NEVER
        request = self.next_prompt()
        return request.arrival_time + self.time_to_first_token if request else _NEVER

    @property
    def has_prompts(self) -> bool:
        """Whether there is anything to prefill: a prompt in progress, or one that waits."""
        return bool(self.prefilling) or len(self.waiting) > 0

    @property
    def may_start(self) -> bool:
        """Whether its own concurrency limit lets the next of its requests run, with all its choices. One with more choices
        than that, as before the limit was lowered, runs alone."""
        if self.max_running == _NEVER or self.num_running_choices == 0:
            return True
        request = self.waiting.first((), may_start=True)
        return self.num_running_choices + (1 if request is None else request.num_choices) <= self.max_running

    @property
    def num_deferred(self) -> int:
        """How many of its waiting requests its own concurrency limit holds back."""
        if self.max_running == _NEVER:
            return 0
        return min(len(self.waiting), max(0, len(self.waiting) - int(self.max_running) + self.num_running_choices))

    def next_prompt(self, *, may_start: bool = True) -> Request | None:
        """The prompt that computes next: one in progress, or one from the queue if one more may start."""
        return self.waiting.first(self.in_progress(), may_start=may_start and self.may_start)


def _seconds(milliseconds: int | None) -> float:
    return _NEVER if milliseconds is None else milliseconds / 1000
