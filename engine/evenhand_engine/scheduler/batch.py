"""Batch: what one step computes, the only thing that the scheduler hands to a runner."""

from typing import Protocol

import msgspec

from evenhand_engine.scheduler.request import Request


class ScheduledRequest(msgspec.Struct, frozen=True, gc=False):
    """The part of one request that a step computes: tokens [num_computed_tokens, + num_scheduled_tokens).

    The runner reads `request.block_table`, which covers these tokens, before `Runner.submit` returns. A token at or
    past `len(request.token_ids)` is in flight: only the runner knows it, since it sampled it.
    """

    request: Request
    num_computed_tokens: int
    num_scheduled_tokens: int
    samples: bool  # True when the last scheduled token is the request's last: its logits give the next output token


class Batch(msgspec.Struct, frozen=True):
    """One step. `scheduled` lists decodes first; `finished_request_ids` left since the previous batch."""

    step_id: int
    scheduled: tuple[ScheduledRequest, ...]
    finished_request_ids: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(item.num_scheduled_tokens for item in self.scheduled)


class Runner(Protocol):
    """Computes batches on a device, in the order in which they are submitted."""

    @property
    def pipeline_depth(self) -> int:
        """How many batches may be submitted before the oldest is collected; 1 on the CPU."""
        ...

    def submit(self, batch: Batch) -> None:
        """Start the batch. Everything it needs of the requests is read before this returns."""
        ...

    def collect(self) -> list[int]:
        """Wait for the oldest submitted batch; one token id for each of its items with `samples`, in order."""
        ...
