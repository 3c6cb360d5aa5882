"""Batch: what one step computes, as data: the only thing that the scheduler hands to a runner.

A running request has a seat, a small number that nobody else has while it runs. The runner keeps what it knows of a
request by seat (its tokens, its block table, how it is sampled), so a batch tells only what is new:

    started            ──▶ all tokens, sampling         once, in the first batch after each admission
    new_block_ids      ──▶ appended to the seat's table with each of its items
    what it sampled    ──▶ appended to the seat's tokens by the runner itself, before anybody else knows them

Batches are computed in the order of their steps, so a seat may have another request in the next batch already.
"""

from array import array
from collections.abc import Sequence
from typing import Protocol

import msgspec

from evenhand_engine.scheduler.request import Request, Sampled, SamplingParams


class StartedRequest(msgspec.Struct, frozen=True):
    """A request that took a seat: what the runner must know of it.

    `token_ids`: all that are known, prompt and, after a preemption, outputs. The array is the runner's own.
    """

    seat: int
    request_id: str
    token_ids: "array[int]"
    num_prompt_tokens: int
    sampling_params: SamplingParams


class ScheduledRequest(msgspec.Struct, frozen=True, gc=False):
    """The part of one request that a step computes: tokens [num_computed_tokens, + num_scheduled_tokens) of its seat.

    The last `len(draft_token_ids)` of these are guesses, which `draft_token_ids` holds; all others the seat has. The
    last `num_samples` of these tokens' logits are sampled: 0 for a chunk that does not end its prompt, else one for the
    next output and one more for each draft. `new_block_ids` go to the end of the seat's block table, which then covers
    all scheduled tokens.
    """

    seat: int
    num_computed_tokens: int
    num_scheduled_tokens: int
    num_samples: int
    new_block_ids: tuple[int, ...] = ()
    draft_token_ids: tuple[int, ...] = ()

    @property
    def first_output(self) -> int:
        """Position in its request of the first output that the item gives."""
        return self.num_computed_tokens + self.num_scheduled_tokens - self.num_samples + 1


class Batch(msgspec.Struct, frozen=True):
    """One step. The first `num_decodes` of `scheduled` are requests past their prompt, one token each (and its drafts).

    `freed_seats` were left since the previous batch; a runner may forget what it knows of them before it takes in
    `started`, which may have the same seats.
    """

    step_id: int
    scheduled: tuple[ScheduledRequest, ...]
    num_decodes: int = 0
    started: tuple[StartedRequest, ...] = ()
    freed_seats: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(item.num_scheduled_tokens for item in self.scheduled)


class BatchPlan:
    """The batch that a step is putting together, and whose its items are."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self._scheduled: list[ScheduledRequest] = []
        self._started: list[StartedRequest] = []
        self._num_decodes = 0

    def add_decodes(self, requests: Sequence[Request]) -> int:
        """The next token of each of these requests past their prompts, which have room for it; returns how many tokens came
        before these. Decodes come before chunks."""
        self._num_decodes += len(requests)
        self.requests += requests
        add, context = self._scheduled.append, 0
        for request in requests:
            start = request.num_computed_tokens
            if len(request.block_table) == request.num_sent_blocks:
                add(ScheduledRequest(request.seat, start, 1, 1))
            else:
                add(ScheduledRequest(request.seat, start, 1, 1, _take_new_blocks(request)))
            context += start
            request.num_computed_tokens = start + 1
            request.num_in_flight_tokens += 1
        return context

    def add_chunk(self, request: Request, num_tokens: int) -> None:
        """The next tokens of a prompt; the last chunk gives an output."""
        self._add(request, num_tokens, int(num_tokens == request.num_pending_tokens))

    def add_drafts(self, index: int, token_ids: tuple[int, ...]) -> None:
        """Guesses that follow the token of decode number `index`; the request has room for them."""
        request, item, count = self.requests[index], self._scheduled[index], len(token_ids)
        self._scheduled[index] = msgspec.structs.replace(
            item,
            num_scheduled_tokens=item.num_scheduled_tokens + count,
            num_samples=item.num_samples + count,
            new_block_ids=item.new_block_ids + _take_new_blocks(request),
            draft_token_ids=token_ids,
        )
        request.num_computed_tokens += count
        request.num_in_flight_tokens += count

    @property
    def decodes(self) -> Sequence[Request]:
        """Requests with a token past their prompt in this step."""
        return self.requests[: self._num_decodes]

    def build(self, step_id: int, freed_seats: Sequence[int]) -> Batch:
        return Batch(step_id, tuple(self._scheduled), self._num_decodes, tuple(self._started), tuple(freed_seats))

    def _add(self, request: Request, num_tokens: int, num_samples: int) -> None:
        if request.num_sent_blocks == 0:
            self._started.append(
                StartedRequest(
                    request.seat,
                    request.request_id,
                    request.token_ids[:],
                    request.num_prompt_tokens,
                    request.sampling_params,
                )
            )
        self.requests.append(request)
        self._scheduled.append(
            ScheduledRequest(
                request.seat, request.num_computed_tokens, num_tokens, num_samples, _take_new_blocks(request)
            )
        )
        request.num_computed_tokens += num_tokens
        request.num_in_flight_tokens += num_samples


def _take_new_blocks(request: Request) -> tuple[int, ...]:
    """Blocks of the request's table that no batch has told the runner yet."""
    num_sent, request.num_sent_blocks = request.num_sent_blocks, len(request.block_table)
    return tuple(request.block_table[num_sent:])


class Runner(Protocol):
    """Computes batches on a device, in the order in which they are submitted."""

    @property
    def pipeline_depth(self) -> int:
        """How many batches may be submitted before the oldest is collected; 1 on the CPU."""
        ...

    def submit(self, batch: Batch) -> None:
        """Start the batch. If this raises, `collect` must not be called for it; later batches may still be submitted."""
        ...

    def collect(self) -> list[Sampled]:
        """Wait for the oldest submitted batch; what was sampled for each of its items with samples, in order."""
        ...
