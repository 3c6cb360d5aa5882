"""Pace: how much goes into each step: the token budget, and the seconds that inter-token objectives leave."""

from collections.abc import Iterator, Sequence

from evenhand_engine.config import SchedulerSettings, SchedulingPolicy
from evenhand_engine.scheduler.request_table import RequestTable
from evenhand_engine.scheduler.step_time import StepShape, StepTimeModel

_NEVER = float("inf")


class StepBudget:
    """Room left in the step that is being planned: tokens, and seconds where inter-token objectives bind."""

    def __init__(
        self, max_tokens: int, model: StepTimeModel, objectives: Sequence[float], min_prefill_tokens: int
    ) -> None:
        """`objectives`: seconds that the step should not exceed. `min_prefill_tokens`: what prompts may use beyond these,
        so that they advance whatever decodes take."""
        self.tokens = max_tokens
        self.shape = StepShape()
        self._model = model
        self._objectives = objectives
        self._max_seconds = min(objectives, default=_NEVER)
        self._min_prefill_tokens = min_prefill_tokens
        self._num_prompt_tokens = 0
        self._num_outputs = 0
        self._num_expected_drafts = 0.0  # that will be right

    def spend(self, num_computed_tokens: int, num_scheduled_tokens: int) -> None:
        """Note that a part of a prompt was scheduled."""
        self.tokens -= num_scheduled_tokens
        self._num_prompt_tokens += num_scheduled_tokens
        self.shape = self.shape.with_chunk(num_scheduled_tokens, num_computed_tokens)

    def spend_decodes(self, num_decodes: int, context: int) -> None:
        """Note what all streams compute in this step: a token each, after `context` tokens in all.

        An objective that they miss alone no longer binds: shorter chunks of prompts could not meet it either.
        """
        self.tokens -= num_decodes
        self._num_outputs = num_decodes
        self.shape = self.shape.with_decodes(num_decodes, context)
        if self._model.is_fitted:
            seconds = self._model.predict(self.shape)
            self._max_seconds = min((limit for limit in self._objectives if limit >= seconds), default=_NEVER)

    def has_room_for_decodes(self, num_decodes: int, context: int, max_seconds: float) -> bool:
        """Whether so many streams may compute a token each, after `context` tokens in all, if nothing else is planned;
        `max_seconds`: the objective that binds them. Before steps can be predicted, no objective does."""
        if num_decodes > self.tokens:
            return False
        if max_seconds == _NEVER or not self._objectives or not self._model.is_fitted:
            return True
        return self._model.predict(StepShape().with_decodes(num_decodes, context)) <= max_seconds

    def fit(self, num_computed_tokens: int, num_pending_tokens: int) -> int:
        """How many of a prompt's pending tokens still go into this step; 0: none."""
        most = min(num_pending_tokens, self.tokens)
        if self._max_seconds == _NEVER or most <= 0:
            return max(0, most)
        if not self._model.is_fitted:
            return max(0, min(most, 4 * self._min_prefill_tokens - self._num_prompt_tokens))
        _, per_token, _, per_pair = self._model.coefficients
        seconds = self._max_seconds - self._model.predict(self.shape)
        # largest x with per_token * x + per_pair * x * (2 * context + x + 1) / 2 <= seconds
        slope, half = per_token + per_pair * (num_computed_tokens + 0.5), per_pair / 2
        if seconds <= 0:
            affordable = 0.0
        elif half * most * most < 1e-3 * slope * most or half == 0:
            affordable = seconds / slope if slope else float(most)
        else:
            affordable = (-slope + (slope * slope + 4 * half * seconds) ** 0.5) / (2 * half)
        return max(0, min(most, max(int(min(affordable, most)), self._min_prefill_tokens - self._num_prompt_tokens)))

    def is_worth_a_draft(self, probability: float, context: int) -> bool:
        """Whether there is room for one more token after `context` tokens, and it gives an output, with this
        probability, no slower than the step gives tokens without it. Before steps can be predicted: no."""
        if self.tokens < 1 or not self._model.is_fitted:
            return False
        seconds = self._model.predict(self.shape)
        more = self._model.predict(self.shape.with_decodes(1, context)) - seconds
        num_tokens = self.shape.num_prefill_tokens + self._num_outputs + self._num_expected_drafts
        return probability * seconds >= more * num_tokens and seconds + more <= self._max_seconds

    def spend_draft(self, probability: float, context: int) -> None:
        """Note that such a token was scheduled."""
        self.tokens -= 1
        self.shape = self.shape.with_decodes(1, context)
        self._num_expected_drafts += probability


class Pace:
    """Sizes the steps. Owner of the step-time model, and of the objectives that bound steps now."""

    def __init__(
        self, settings: SchedulerSettings, request_table: RequestTable, token_budgets: Iterator[int] | None
    ) -> None:
        self.step_time = StepTimeModel()
        self._settings = settings
        self._request_table = request_table
        self._token_budgets = token_budgets
        self._held_until: dict[str, float] = {}  # tenants whose inter-token objective bounds steps

    def budget(self, now: float) -> StepBudget:
        """The room of the step that begins now."""
        max_tokens = self._settings.max_num_batched_tokens
        if self._token_budgets is not None:
            max_tokens = min(max_tokens, next(self._token_budgets))
        return StepBudget(max_tokens, self.step_time, self._objectives(now), self._settings.min_prefill_tokens)

    def _objectives(self, now: float) -> list[float]:
        """The inter-token objectives, in seconds, of the tenants that stream, or did a moment ago.

        Those who run without one have the default step's, which makes prompts wait, but no stream: it is no tenant's.
        """
        if self._settings.scheduling_policy is not SchedulingPolicy.FAIR:
            return []
        objectives, target = set(), self._target_seconds()
        for tenant_id, tenant in self._request_table.running_tenants.items():
            if tenant.inter_token_latency != _NEVER:
                self._held_until[tenant_id] = now + self._settings.objective_hold_seconds
            elif target is not None:
                objectives.add(target)
        self._held_until = {tenant_id: until for tenant_id, until in self._held_until.items() if until >= now}
        objectives |= {self._request_table.tenant(tenant_id).inter_token_latency for tenant_id in self._held_until}
        return list(objectives)

    def _target_seconds(self) -> float | None:
        """The default step's, or as long as prompts need not to lose more than it may cost."""
        settings = self._settings
        if settings.target_step_seconds is None or not self.step_time.is_fitted:
            return settings.target_step_seconds
        needed = self.step_time.seconds_at(1 - settings.target_step_cost, settings.max_num_batched_tokens)
        return max(settings.target_step_seconds, needed)
