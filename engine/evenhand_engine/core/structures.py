"""Structures: which tokens may come next in outputs that must follow a grammar, computed while the step runs.

begin a step ──▶ a thread computes the masks ──▶ the step's logits are there ──▶ masked, sampled ──▶ matchers advance
"""

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from llguidance import LLMatcher
from numpy.typing import NDArray

from evenhand_engine.scheduler.batch import Batch, ScheduledRequest
from evenhand_engine.scheduler.request import Sampled

Forbidden = NDArray[np.bool_]
"""[vocab_size], of one row of logits."""


class Structures:
    """Matchers of requests by id, and of those that run by seat."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._compiled: dict[str, LLMatcher] = {}
        self._seated: dict[int, LLMatcher] = {}
        self._thread = ThreadPoolExecutor(1, "masks")

    def add(self, request_id: str, compiled: LLMatcher) -> None:
        """The request's output must follow this grammar; told before it is scheduled."""
        self._compiled[request_id] = compiled

    def forget(self, request_id: str) -> None:
        """It has ended."""
        self._compiled.pop(request_id, None)

    def begin(self, batch: Batch) -> "Future[dict[int, Forbidden]] | None":
        """Take in who sits where, and begin the masks by row of the batch's logits; None: there are none."""
        for seat in (*batch.freed_seats, *(started.seat for started in batch.started)):
            self._seated.pop(seat, None)
        for started in batch.started:
            if (compiled := self._compiled.get(started.request_id)) is not None:
                matcher = compiled.deep_copy()
                self._seated[started.seat] = matcher
                self._advance(started.seat, tuple(started.token_ids[started.num_prompt_tokens :]))
        if not any(item.num_samples and item.seat in self._seated for item in batch.scheduled):
            return None
        return self._thread.submit(self._compute, batch.scheduled)

    def advance(self, batch: Batch, results: list[Sampled]) -> None:
        """Go on by what was sampled for each item with samples."""
        sampled = (item for item in batch.scheduled if item.num_samples)
        for item, result in zip(sampled if self._seated else (), results, strict=bool(self._seated)):
            self._advance(item.seat, result.token_ids)

    def has_failed(self, seat: int) -> bool:
        """Whether the grammar of who sits there became too complex in this output, so that no token may come."""
        matcher = self._seated.get(seat)
        return matcher is not None and matcher.is_error()

    def _advance(self, seat: int, token_ids: tuple[int, ...]) -> None:
        for token_id in token_ids:
            if (matcher := self._seated.get(seat)) is None:
                return
            was_complete = matcher.is_stopped()
            matcher.consume_token(token_id)
            if not matcher.is_error() and (was_complete or matcher.stop_reason() == "EndOfSentence"):
                del self._seated[seat]  # its end has come: whoever ignores that may write what it likes

    def _compute(self, items: tuple[ScheduledRequest, ...]) -> dict[int, Forbidden]:
        """Thread. A row after a draft is masked as if the draft were right."""
        masks, row = {}, 0
        for item in items:
            matcher = self._seated.get(item.seat)
            num_consumed = 0
            for number in range(item.num_samples if matcher is not None else 0):
                if matcher is None or (number and not matcher.try_consume_tokens([item.draft_token_ids[number - 1]])):
                    break  # no row after a wrong draft is looked at
                num_consumed += number > 0
                masks[row + number] = self._forbidden(matcher)
            if matcher is not None and num_consumed:
                matcher.rollback(num_consumed)
            row += item.num_samples
        return masks

    def _forbidden(self, matcher: LLMatcher) -> Forbidden:
        """All tokens where the grammar became too complex: the request has no next token then, and ends."""
        mask = b"" if matcher.is_error() else matcher.compute_bitmask()
        if matcher.is_error():
            return np.ones(self._vocab_size, np.bool_)
        bits = np.unpackbits(np.frombuffer(mask, np.uint8), count=self._vocab_size, bitorder="little")
        forbidden: Forbidden = bits == 0
        return forbidden
