"""Thought: where an output is in its reasoning. Pure."""

from typing import NamedTuple

from evenhand_engine.scheduler.request import Reasoning


class Thought(NamedTuple):
    """A place in the reasoning of one output, or before it.

    Attributes:
        num_tokens: of reasoning so far; None: it has not begun.
    """

    reasoning: Reasoning
    num_tokens: int | None

    @classmethod
    def of(cls, reasoning: Reasoning) -> "Thought":
        """Before the first output."""
        return cls(reasoning, 0 if reasoning.starts_inside else None)

    @property
    def has_begun(self) -> bool:
        return self.num_tokens is not None

    @property
    def num_left(self) -> float:
        """Tokens until only its end may come."""
        budget = self.reasoning.budget
        return float("inf") if budget is None else budget - (self.num_tokens or 0)

    def after(self, token_id: int) -> "Thought | None":
        """With one more output. Itself, if that is not of the reasoning; None: it is over."""
        if self.num_tokens is None:
            return self._replace(num_tokens=0) if token_id == self.reasoning.begin else self
        return None if token_id == self.reasoning.end else self._replace(num_tokens=self.num_tokens + 1)
