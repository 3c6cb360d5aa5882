"""Follower: where one output is in what it must follow: its reasoning first, if that is told apart, then a grammar, if it has one."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from evenhand_engine.core.reasoning import Thought
from evenhand_engine.scheduler.request import Reasoning

if TYPE_CHECKING:
    from llguidance import LLMatcher

Mask = NDArray[np.int32]
"""[ceil(vocab_size / 32)], of one row of logits: bit t % 32 of word t // 32 allows token t."""


class Follower:
    """Of one request that runs.

    Args:
        matcher: of the grammar, at its beginning; nobody else uses it.
        reasoning: None: the grammar, which there is then, holds from the first output on.
        num_prompt_tokens: the position of the first output.

    Attributes:
        has_ended: whoever ignores the end of the grammar may write what it likes from here on.
    """

    def __init__(
        self, matcher: "LLMatcher | None", reasoning: Reasoning | None, num_prompt_tokens: int, vocab_size: int
    ) -> None:
        self._matcher = matcher
        self._thought = None if reasoning is None else Thought.of(reasoning)
        self._position = num_prompt_tokens  # of the next output
        self._num_words = -(-vocab_size // 32)
        self.has_ended = False

    @property
    def has_failed(self) -> bool:
        """Whether the grammar became too complex, so that no token may come."""
        return self._matcher is not None and self._matcher.is_error()

    def is_free_until(self, position: int) -> bool:
        """Whether no output before that position can be masked, whatever comes."""
        if self._matcher is not None:
            return self.has_ended
        return self._thought is None or position - self._position <= self._thought.num_left

    def advance(self, token_ids: Sequence[int]) -> None:
        """These have come."""
        for token_id in token_ids:
            self._position += 1
            if not self.has_ended:
                self._take(token_id)

    def _take(self, token_id: int) -> None:
        thought, matcher = self._thought, self._matcher
        if thought is not None:
            self._thought = thought.after(token_id)
        if self._thought is not thought:
            self.has_ended = self._thought is None and matcher is None
        elif matcher is not None:  # the output has begun without reasoning, or is past it
            self._thought = None
            was_complete = matcher.is_stopped()
            matcher.consume_token(token_id)
            self.has_ended = not matcher.is_error() and (was_complete or matcher.stop_reason() == "EndOfSentence")

    def masks(self, draft_token_ids: Sequence[int]) -> dict[int, Mask]:
        """Of the next token (0), and of those after drafts as if these were right, up to the first that cannot be. Where there is
        none, all may come."""
        if self.has_ended:
            return {}
        found, thought, num_consumed = {}, self._thought, 0
        for place, token_id in enumerate((*draft_token_ids, None)):
            mask = self._mask(thought)
            if mask is not None:
                found[place] = mask
            if token_id is None or (mask is not None and not _allows(mask, token_id)):
                break
            later = None if thought is None else thought.after(token_id)
            if later is thought and self._matcher is not None:
                if not self._matcher.try_consume_tokens([token_id]):
                    break
                num_consumed += 1
                later = None
            thought = later
        if self._matcher is not None and num_consumed:
            self._matcher.rollback(num_consumed)
        return found

    def _mask(self, thought: Thought | None) -> Mask | None:
        if thought is not None and thought.has_begun:
            return self._of(thought.reasoning.end) if thought.num_left <= 0 else None
        if self._matcher is None:
            return None
        mask = self._of_grammar(self._matcher)
        return mask if thought is None else mask | self._of(thought.reasoning.begin)

    def _of_grammar(self, matcher: "LLMatcher") -> Mask:
        """No token where the grammar became too complex: the request has no next token then, and ends."""
        bits = b"" if matcher.is_error() else matcher.compute_bitmask()
        if matcher.is_error():
            return np.zeros(self._num_words, np.int32)
        known = np.frombuffer(bits, np.int32)[: self._num_words]
        return known if len(known) == self._num_words else np.pad(known, (0, self._num_words - len(known)))

    def _of(self, token_id: int) -> Mask:
        """That token alone."""
        words = np.zeros(self._num_words, np.uint32)
        words[token_id // 32] = 1 << (token_id % 32)
        return words.view(np.int32)


def _allows(mask: Mask, token_id: int) -> bool:
    return bool(mask.view(np.uint32)[token_id // 32] >> np.uint32(token_id % 32) & np.uint32(1))
