"""Gauges: what an upstream reports of itself."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Gauges:
    """What an upstream says of itself, some time ago. None: it does not say.

    Attributes:
        num_waiting: requests in its queue.
        kv_usage: used part of its KV cache, 0 to 1.
        num_preemptions: since its start.
        num_tokens: tokens it has generated since its start; tells a live report from a frozen one.
    """

    num_waiting: int | None = None
    kv_usage: float | None = None
    num_preemptions: int | None = None
    num_tokens: int | None = None
