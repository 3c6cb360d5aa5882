"""Speculation: guesses a stream's next tokens, so that one step can give several of them.

A guess is what followed the last few tokens when they came before in the same request (prompt lookup decoding, Saxena
2023, github.com/apoorvumang/prompt-lookup-decoding): text that quotes, edits or repeats is full of such places. The
step computes the guessed tokens, *drafts*, behind the stream's own, and keeps those that are what would have come anyway:

    tokens    … the  cat  sat … the  cat │ sat  on  the      drafts, of which the step accepts as many as are right
                └──────┬─────┘  └───┬──┘
               what followed       the last tokens

Drafts take what is left of a step when everybody else has had his part, and only while they bring tokens faster than
the step does without them.
"""

from array import array
from collections.abc import Sequence

from evenhand_engine.config import SchedulerSettings
from evenhand_engine.scheduler.batch import BatchPlan
from evenhand_engine.scheduler.pace import StepBudget
from evenhand_engine.scheduler.request import Request
from evenhand_engine.scheduler.request_table import RequestTable

_NGRAM = 3  # tokens that must have come before
_WINDOW = 8_192  # tokens back that are searched: what one look costs is bounded
_MEMORY = 0.125  # of the last guess in a request's acceptance


def look_up(token_ids: "array[int]", most: int) -> tuple[int, ...]:
    """Up to `most` tokens that followed the last tokens the last time that they came; none if they never did.

    What followed may reach the end itself: then it repeats from there.
    """
    if most <= 0 or len(token_ids) <= _NGRAM:
        return ()
    first, size = max(0, len(token_ids) - _WINDOW), token_ids.itemsize
    tokens = token_ids[first:].tobytes()
    needle = tokens[-_NGRAM * size :]
    found = tokens.rfind(needle, 0, len(tokens) - size)
    while found >= 0 and found % size:  # across two tokens
        found = tokens.rfind(needle, 0, found + len(needle) - 1)
    if found < 0:
        return ()
    start = first + found // size + _NGRAM
    period = len(token_ids) - start
    return tuple(token_ids[start + number % period] for number in range(most))


class Speculation:
    """Adds drafts to the streams of a step, and learns from what came of them.

    Attributes:
        num_drafts: streams' steps with drafts, since the start.
        num_draft_tokens: drafts in all.
        num_accepted_tokens: drafts that were right.
    """

    def __init__(self, settings: SchedulerSettings, request_table: RequestTable) -> None:
        self.num_drafts = 0
        self.num_draft_tokens = 0
        self.num_accepted_tokens = 0
        self._settings = settings
        self._request_table = request_table

    def extend(self, plan: BatchPlan, budget: StepBudget, *, may_grow: bool) -> None:
        """Put drafts behind the streams of the step, all else of which is planned.

        `may_grow`: whether a stream may take a block for them, of those that nobody who runs needs.
        """
        if not self._settings.num_speculative_tokens:
            return
        for index, request in enumerate(plan.decodes):
            request.guess = look_up(request.token_ids, self._most(request))
            room = self._room(request, may_grow=may_grow)
            drafts = self._worthwhile(request, request.guess[:room], budget)
            if drafts:
                self._request_table.blocks.grow(request, request.num_computed_tokens + len(drafts))
                plan.add_drafts(index, drafts)
                self.num_drafts += 1
                self.num_draft_tokens += len(drafts)

    def learn(self, request: Request, token_ids: Sequence[int]) -> None:
        """The stream's next tokens are known: guesses were right, drafted or not, as far as they agree with these."""
        for guessed, token_id in zip(request.guess, token_ids, strict=False):
            request.acceptance += _MEMORY * ((guessed == token_id) - request.acceptance)
        request.guess = ()
        self.num_accepted_tokens += max(0, len(token_ids) - 1)

    def _most(self, request: Request) -> int:
        """Guesses that can be outputs: one token of the step is certain, and the request has an end."""
        return min(self._settings.num_speculative_tokens, request.max_num_tokens - request.num_tokens)

    def _room(self, request: Request, *, may_grow: bool) -> int:
        """Tokens that fit into the request's blocks, and into new ones that nobody will miss."""
        num_blocks = len(request.block_table)
        if may_grow:
            num_blocks += self._request_table.capacity.num_spare_blocks(request)
        return num_blocks * self._settings.block_size - request.num_computed_tokens

    def _worthwhile(self, request: Request, guess: tuple[int, ...], budget: StepBudget) -> tuple[int, ...]:
        """As much of the guess as is worth its time: each token is right only if all before it are."""
        probability, count = request.acceptance, 0
        while count < len(guess) and budget.is_worth_a_draft(probability, request.num_computed_tokens):
            budget.spend_draft(probability, request.num_computed_tokens)
            probability *= request.acceptance
            count += 1
        return guess[:count]
