"""Structures: which tokens may come next in outputs that must follow a grammar, or end their reasoning in time.

    begin a step ──▶ masks, while the step runs ──▶ the step's logits are there ──▶ masked, sampled ──▶ followers advance

Who computes steps ahead begins the next one before the last has advanced, and asks for its masks after that. Of a model in
several parts the first knows the grammars and shares its masks; seats and steps are those of all parts.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from evenhand_engine.core.followers import Follower, Mask
from evenhand_engine.model.sharding import Share
from evenhand_engine.scheduler.batch import Batch, ScheduledRequest, StartedRequest
from evenhand_engine.scheduler.request import FinishReason, Sampled

if TYPE_CHECKING:
    from llguidance import LLMatcher  # whoever adds grammars has it; an engine without any needs no package for them


class Structures:
    """Matchers of requests by id, and followers of those that run by seat."""

    def __init__(self, vocab_size: int, share: Share | None = None) -> None:
        """`share`: what the first of several parts makes, on all of them. None: this is all of the model."""
        self._vocab_size, self._share = vocab_size, share
        self._compiled: dict[str, LLMatcher] = {}
        self._seated: dict[int, Follower] = {}

    def add(self, request_id: str, compiled: "LLMatcher") -> None:
        """The request's output must follow this grammar; told before it is scheduled."""
        self._compiled[request_id] = compiled

    def forget(self, request_id: str) -> None:
        """It has ended."""
        self._compiled.pop(request_id, None)

    def begin(self, batch: Batch) -> "StructuredStep | None":
        """Take in who sits where; the batch's part of this, or None: no row of its logits is masked."""
        for seat in (*batch.freed_seats, *(started.seat for started in batch.started)):
            self._seated.pop(seat, None)
        for started in batch.started:
            if (follower := self._follower(started)) is not None:
                self._seated[started.seat] = follower
        if not self._seated:
            return None
        items, row = [], 0
        for number, item in enumerate(item for item in batch.scheduled if item.num_samples):
            if (follower_of := self._seated.get(item.seat)) is not None and not follower_of.has_ended:
                items.append(_Item(number, row, item, follower_of))
            row += item.num_samples
        return StructuredStep(items, self._share) if items or self._share is not None else None

    def _follower(self, started: StartedRequest) -> Follower | None:
        """One whose grammar is not here, but another part's, allows everything."""
        params = started.sampling_params
        compiled, reasoning = self._compiled.get(started.request_id), params.reasoning
        if compiled is None and reasoning is None and params.grammar is None:
            return None
        matcher = None if compiled is None else compiled.deep_copy()
        follower = Follower(matcher, reasoning, started.num_prompt_tokens, self._vocab_size)
        follower.advance(started.token_ids[started.num_prompt_tokens :])
        return follower


class _Item(NamedTuple):
    """Of a batch: its number among those with samples, and its first row of logits."""

    number: int
    row: int
    item: ScheduledRequest
    follower: Follower


class StructuredStep:
    """The items of one batch whose outputs are followed, whoever has their seats later."""

    def __init__(self, items: Sequence[_Item], share: Share | None) -> None:
        self._items, self._share = items, share

    @property
    def is_free(self) -> bool:
        """Whether nothing is masked, whatever the batches before it bring."""
        return all(follower.is_free_until(item.first_output + item.num_samples) for _, _, item, follower in self._items)

    def masks(self, catch_up: Callable[[], object] = lambda: None) -> dict[int, Mask]:
        """By row of the batch's logits. May run beside the step.

        `catch_up` is called where that needs all batches before it to have advanced; when it returns, they have.
        """
        if self._share is not None:
            return _unpacked(self._share(lambda: _packed(self._made(catch_up))))
        return self._made(catch_up)

    def _made(self, catch_up: Callable[[], object]) -> dict[int, Mask]:
        if self.is_free:
            return {}
        catch_up()
        found: dict[int, Mask] = {}
        for _, row, item, follower in self._items:
            found |= {row + place: mask for place, mask in follower.masks(item.draft_token_ids).items()}
        return found

    def advance(self, results: list[Sampled]) -> None:
        """Go on by what was sampled for each item with samples; where a grammar is why there is no token, the result says so
        from now on."""
        for number, _, _, follower in self._items:
            follower.advance(results[number].token_ids)
            if not results[number].token_ids and follower.has_failed:
                results[number] = msgspec.structs.replace(results[number], failure=FinishReason.GRAMMAR)


def _packed(masks: dict[int, Mask]) -> tuple[list[int], NDArray[np.int32]] | None:
    """Their rows, and all of them in one array, [num_masks, num_words]; None: there are none."""
    return (list(masks), np.stack(list(masks.values()))) if masks else None


def _unpacked(packed: tuple[list[int], NDArray[np.int32]] | None) -> dict[int, Mask]:
    return {} if packed is None else dict(zip(*packed, strict=True))
