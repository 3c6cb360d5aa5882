"""Pace: how much goes into each step: the token budget, and the seconds that inter-token objectives leave."""

from collections.abc import Iterator

from evenhand_engine.config import SchedulerSettings, SchedulingPolicy
from evenhand_engine.scheduler.roster import Roster
from evenhand_engine.scheduler.step_time import StepBudget, StepTimeModel

_NEVER = float("inf")


class Pace:
    """Sizes the steps. Owner of the step-time model, and of the objectives that bound steps now."""

    def __init__(self, settings: SchedulerSettings, roster: Roster, token_budgets: Iterator[int] | None) -> None:
        self.step_time = StepTimeModel()
        self._settings = settings
        self._roster = roster
        self._token_budgets = token_budgets
        self._held_until: dict[str, float] = {}  # tenants whose inter-token objective bounds steps

    def budget(self, now: float) -> StepBudget:
        """The room of the step that begins now."""
        max_tokens = self._settings.max_num_batched_tokens
        if self._token_budgets is not None:
            max_tokens = min(max_tokens, next(self._token_budgets))
        return StepBudget(max_tokens, self.step_time, self._objectives(now), self._settings.min_prefill_tokens)

    def _objectives(self, now: float) -> list[float]:
        """The inter-token objectives, in seconds, of the tenants that stream, or did a moment ago."""
        if self._settings.scheduling_policy is not SchedulingPolicy.FAIR:
            return []
        for tenant_id, tenant in self._roster.running_tenants.items():
            if tenant.inter_token_latency != _NEVER:
                self._held_until[tenant_id] = now + self._settings.objective_hold_seconds
        self._held_until = {tenant_id: until for tenant_id, until in self._held_until.items() if until >= now}
        return [self._roster.tenant(tenant_id).inter_token_latency for tenant_id in self._held_until]
