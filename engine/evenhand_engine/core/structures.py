"""Structures: which tokens may come next in outputs that must follow a grammar.

    begin a step ──▶ masks, while the step runs ──▶ the step's logits are there ──▶ masked, sampled ──▶ matchers advance

Who computes steps ahead begins the next one before the last has advanced, and asks for its masks after that.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from evenhand_engine.scheduler.batch import Batch, ScheduledRequest
from evenhand_engine.scheduler.request import FinishReason, Sampled

if TYPE_CHECKING:
    from llguidance import LLMatcher  # whoever adds grammars has it; an engine without any needs no package for them

Mask = NDArray[np.int32]
"""[ceil(vocab_size / 32)], of one row of logits: bit t % 32 of word t // 32 allows token t."""


class Structures:
    """Matchers of requests by id, and of those that run by seat."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._compiled: dict[str, LLMatcher] = {}
        self._seated: dict[int, _Follower] = {}

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
            if (compiled := self._compiled.get(started.request_id)) is not None:
                follower = self._seated[started.seat] = _Follower(compiled.deep_copy(), self._vocab_size)
                follower.advance(started.token_ids[started.num_prompt_tokens :])
        if not self._seated:
            return None
        items, row = [], 0
        for number, item in enumerate(item for item in batch.scheduled if item.num_samples):
            if (follower_of := self._seated.get(item.seat)) is not None and not follower_of.has_ended:
                items.append(_Item(number, row, item, follower_of))
            row += item.num_samples
        return StructuredStep(items) if items else None


class _Follower:
    """Where one request is in its grammar."""

    def __init__(self, matcher: "LLMatcher", vocab_size: int) -> None:
        self._matcher = matcher
        self._num_words = -(-vocab_size // 32)
        self.has_ended = False  # then whoever ignores the end may write what it likes

    @property
    def has_failed(self) -> bool:
        """Whether the grammar became too complex, so that no token may come."""
        return self._matcher.is_error()

    def advance(self, token_ids: Sequence[int]) -> None:
        """These have come."""
        matcher = self._matcher
        for token_id in token_ids:
            if self.has_ended:
                return
            was_complete = matcher.is_stopped()
            matcher.consume_token(token_id)
            self.has_ended = not matcher.is_error() and (was_complete or matcher.stop_reason() == "EndOfSentence")

    def masks(self, draft_token_ids: Sequence[int]) -> list[Mask]:
        """Of the next token, and of those after drafts as if these were right, up to the first that cannot be."""
        masks, num_consumed = [self._mask()], 0
        for token_id in draft_token_ids:
            if not self._matcher.try_consume_tokens([token_id]):
                break
            num_consumed += 1
            masks.append(self._mask())
        if num_consumed:
            self._matcher.rollback(num_consumed)
        return masks

    def _mask(self) -> Mask:
        """No token where the grammar became too complex: the request has no next token then, and ends."""
        words = np.zeros(self._num_words, np.int32)
        bits = b"" if self._matcher.is_error() else self._matcher.compute_bitmask()
        if not self._matcher.is_error():
            known = np.frombuffer(bits, np.int32)[: self._num_words]
            words[: len(known)] = known
        return words


class _Item(NamedTuple):
    """Of a batch: its number among those with samples, and its first row of logits."""

    number: int
    row: int
    item: ScheduledRequest
    follower: _Follower


class StructuredStep:
    """The items of one batch whose outputs follow grammars, whoever has their seats later."""

    def __init__(self, items: Sequence[_Item]) -> None:
        self._items = items

    def masks(self) -> dict[int, Mask]:
        """By row of the batch's logits, once all batches before it have advanced. May run beside the step."""
        found: dict[int, Mask] = {}
        for _, row, item, follower in self._items:
            if not follower.has_ended:
                found |= enumerate(follower.masks(item.draft_token_ids), row)
        return found

    def advance(self, results: list[Sampled]) -> None:
        """Go on by what was sampled for each item with samples; where a grammar is why there is no token, the result says so
        from now on."""
        for number, _, _, follower in self._items:
            follower.advance(results[number].token_ids)
            if not results[number].token_ids and follower.has_failed:
                results[number] = msgspec.structs.replace(results[number], failure=FinishReason.GRAMMAR)


def forbidden(mask: Mask, vocab_size: int) -> NDArray[np.bool_]:
    """[vocab_size]: the tokens that may not come."""
    found: NDArray[np.bool_] = np.unpackbits(mask.view(np.uint8), count=vocab_size, bitorder="little") == 0
    return found
