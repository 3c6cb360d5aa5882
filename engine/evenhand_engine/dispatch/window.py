"""Window: how much may be in flight to an upstream whose own queue is first come, first served.

What has been sent can no longer be reordered. So as little as possible is sent ahead, but never so little that the
upstream lacks work. Two counts, both seen on the wire at the moment they change, bound it:

    unstarted   prompt tokens of requests sent without a first chunk: what the upstream queues and prefills
    in flight   tokens of all requests sent: prompts, outputs so far, and outputs still expected: what fills its KV cache

*The rule.* A request is sent if nothing is in flight; else if (1) it is its prompt's turn, (2) all tokens in flight and its
own are within `kv_tokens`, and (3) a seat is free of those that the upstream says it has.

*Turns of prompts.* A *short* prompt, within `batch_tokens`, is sent while fewer than two short ones are unstarted, or they and
its own are together within `batch_tokens`. Two, because one computes while the other waits: with one the upstream would run a
step without a prompt for each prompt. A *long* one keeps the upstream busy for many steps, in which whoever comes later waits.
So it is sent when what is left of those before it is no more than a twelfth of its own, so that the upstream seldom lacks a prompt: a step
without a long one is short. What is left is estimated: prompts are taken to be prefilled
one after another, at the rate seen so far, and none to be done before its first chunk. While a short one is unstarted, which would share
a full step with it, it is sent once the last step of the first of those has begun: too late for that step, which takes in the short
one, and in time for the next. That it has begun is told by the event of any stream, as less than half a step is left; where none tells,
it is sent when the first of those is done, or should have been for a tenth of its time.

*The reserve.* Tenants that have few requests in flight may use a thirty-second more of the tokens, and of the seats a part that
others leave free: else one of them waits until somebody else's request ends, and requests that began together end together.

*What is learned.* The rate, by what was left when a prompt was sent and how long its first chunk took. `batch_tokens` follows
the prompt tokens that the upstream takes at once. If first chunks come and every request sent before them has started, while
a short one waits here, the upstream had nothing left to start: it grows by a quarter. Otherwise it shrinks, with a half-life of
2 s of holding back. So it stays just above what keeps the upstream busy, whatever its batch budget, and no gauge takes part.
`kv_tokens` is what the upstream says of its cache, or unbounded; where that is unknown or wrong, (1) still bounds what queues: a
request without memory does not start.

*Gauges* come late, or freeze, so they only correct, a little at each report that differs from the last: preemptions
shrink `kv_tokens`; a cache that is not full while `kv_tokens` holds somebody back grows it; a queue upstream that is longer
than what is unstarted shrinks `batch_tokens`.

*Silent requests*, whose answer comes at once at their end, show no start. They are taken to be prefilled one after
another at the rate seen of others, and to have started where one that was sent later has.
"""

from evenhand_engine.dispatch.flight import Flight, Room
from evenhand_engine.dispatch.gauges import Gauges
from evenhand_engine.dispatch.prefill_rate import PrefillRate
from evenhand_engine.dispatch.steps import Steps

_MIN_UNSTARTED = 2
_LEAD = 1 / 12  # of a long prompt: what is left of those before it when it is sent
_LATENESS = 0.1  # of the prompt before a short one: how much later than estimated it is taken to be done
_LAST_STEP = 0.5  # of a step: no more of a prompt is left where its last one begins, and hardly less before that
_KV_MARGIN = 0.95  # of the upstream's cache: blocks are never all full
_RESERVE = 1 / 32
_GROWTH = 1.25
_HALF_LIFE_SECONDS = 2.0
_BURST_SECONDS = 0.005  # first chunks of one step come within this time
_LARGEST_BATCH = 1 << 17
_SMALLEST_BATCH = 16
_SHRINKAGE = 0.95  # of what was in flight when the upstream preempted
_CORRECTION_SECONDS = 5.0  # between two corrections by preemptions: what they free shows later
_ROOMY_CACHE = 0.9  # in use; below it the cache is not what limits
_EMPTY_CACHE = 0.5  # below it much too little is in flight
_ROUNDING = 1e-6  # tokens
_NEVER = float("inf")


class Window:
    """Counts what is in flight, and says whether there is room. Time is an argument and never runs backwards.

    Args:
        batch_tokens: prompt tokens that the upstream takes at once, to begin with.
        kv_tokens: size of the upstream's KV cache in tokens; None: unknown.
        prefill_rate: prompt tokens a second, to begin with.

    Attributes:
        batch_tokens, kv_tokens: as learned.
        num_seats: requests that the upstream runs at once, as it says (llama.cpp's slots); infinite: it does not.
        num_seats_taken: by what is in flight; more than there are where the last one asked for several answers.
        num_unstarted_tokens, num_tokens: in flight, see above.
    """

    def __init__(
        self, *, batch_tokens: float = 4096.0, kv_tokens: int | None = None, prefill_rate: float = 8000.0
    ) -> None:
        self.batch_tokens = batch_tokens
        self.kv_tokens = self.num_seats = _NEVER
        self.num_seats_taken = self.num_unstarted_tokens = self.num_tokens = 0
        self._flights: dict[Flight, None] = {}
        self._unstarted: dict[Flight, None] = {}  # in the order in which they were sent
        self._silent: dict[Flight, None] = {}  # of these
        self._num_short = self._num_short_tokens = 0  # of the unstarted
        self._rate = PrefillRate(prefill_rate)
        self._head_since = -_NEVER  # when the last one before the head started
        self._opens_at = _NEVER
        self._steps = Steps()
        self._ending: Flight | None = None  # a long one whose last step has begun, in which a short one is taken in
        self._silent_until = 0.0  # when the silent ones sent so far will have been prefilled
        self._burst_at = self._last_start = self._grew_at = -_NEVER
        self._holds_for_batch = False  # a short prompt waited for (1), or any request for (2), when last asked
        self._holds_for_kv = False
        self._aged_at = 0.0
        self._gauges = Gauges()
        self._peak_tokens = 0  # in flight since the last report
        self._shrank_at = -_NEVER
        self.resize_kv(kv_tokens)

    @property
    def num_in_flight(self) -> int:
        return len(self._flights)

    @property
    def num_unstarted(self) -> int:
        return len(self._unstarted)

    def resize_kv(self, kv_tokens: int | None) -> None:
        """The upstream says how large its cache is; None: it does not."""
        self.kv_tokens = _NEVER if kv_tokens is None else kv_tokens * _KV_MARGIN

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens that the upstream prefills in a second, as seen so far."""
        return self._rate.tokens_per_second

    def num_left_tokens(self, now: float) -> float:
        """Prompt tokens that the upstream has still to prefill, by estimate."""
        head = next(iter(self._unstarted), None)
        if head is None:
            return 0.0
        return self.num_unstarted_tokens - min(self._num_computed_tokens(head, now), head.num_prompt_tokens)

    def _num_computed_tokens(self, head: Flight, now: float) -> float:
        """As many as there was time for since the first of the unstarted had its turn upstream."""
        return (now - self._turn_of(head)) * self.prefill_rate

    def _turn_of(self, head: Flight) -> float:
        return max(head.sent_at, self._head_since)

    def room(self, num_prompt_tokens: int, num_expected_tokens: int, now: float) -> Room:
        """Whether such a request may be sent now. What is not FREE is remembered: somebody waits for the window."""
        self.release()
        if not self._flights:
            return Room.FREE
        num_tokens = self.num_tokens + num_prompt_tokens + num_expected_tokens
        has_turn = self._has_turn(num_prompt_tokens, now)
        self._holds_for_kv = num_tokens > self.kv_tokens
        if not has_turn or num_tokens > self.kv_tokens * (1 + _RESERVE) or self.num_seats_taken >= self.num_seats:
            return Room.NONE
        is_scarce = self._holds_for_kv or self.num_seats_taken >= self.num_seats * (1 - _RESERVE)
        return Room.RESERVED if is_scarce else Room.FREE

    def _has_turn(self, num_prompt_tokens: int, now: float) -> bool:
        if num_prompt_tokens <= self.batch_tokens:
            is_full = self._num_short_tokens + num_prompt_tokens > self.batch_tokens
            self._holds_for_batch = self._num_short >= _MIN_UNSTARTED and is_full
            return not self._holds_for_batch
        head = next(iter(self._unstarted), None)
        if head is None:
            return True
        num_before, lead = self.num_unstarted_tokens - head.num_prompt_tokens, _LEAD * num_prompt_tokens
        if self._num_short:  # the step that takes these in is to have begun
            num_before -= self._num_short_tokens - (0 if head.is_long else head.num_prompt_tokens)
            lead = -_LATENESS * head.num_prompt_tokens
        if num_before > max(lead, 0.0):
            return False  # the first chunk of one is awaited
        if self._num_short and self._ending is head:
            return True
        num_more = num_before + head.num_prompt_tokens - self._num_computed_tokens(head, now) - lead
        if num_more > _ROUNDING:
            self._opens_at = now + num_more / self.prefill_rate
        return num_more <= _ROUNDING

    def release(self) -> None:
        """Nobody waits for the window."""
        self._holds_for_batch = self._holds_for_kv = False
        self._opens_at = _NEVER

    def send(
        self,
        num_prompt_tokens: int,
        num_expected_tokens: int,
        now: float,
        *,
        num_seats: int = 1,
        is_silent: bool = False,
    ) -> Flight:
        """A request goes to the upstream."""
        flight = Flight(num_prompt_tokens, num_expected_tokens, is_silent, now, num_seats)
        self.num_seats_taken += num_seats
        flight.is_long = num_prompt_tokens > self.batch_tokens
        flight.backlog = self.num_left_tokens(now) + num_prompt_tokens
        if is_silent:
            self._silent_until = max(self._silent_until, now) + num_prompt_tokens / self.prefill_rate
            flight.due = self._silent_until
            self._silent[flight] = None
        self._count_unstarted(flight, 1, num_prompt_tokens)
        self.num_tokens += flight.num_tokens
        self._peak_tokens = max(self._peak_tokens, self.num_tokens)
        self._flights[flight] = self._unstarted[flight] = None
        return flight

    def start(self, flight: Flight, now: float) -> None:
        """Its first chunk came; silent ones sent before it have started too. Again: nothing."""
        if flight not in self._unstarted:
            return
        for earlier in [f for f in self._silent if f.sent_at < flight.sent_at]:
            self._leave_unstarted(earlier)
        if next(iter(self._unstarted)) is flight:  # else it did not wait for all that was left before it
            self._rate.observe(flight.backlog, now - flight.sent_at)
            self._head_since = now
        self._leave_unstarted(flight)
        self._learn_batch(now)

    def hear(self, now: float) -> bool:
        """An event of any answer came. Returns whether it tells of a step that a long one waited for, and that has begun."""
        if not self._steps.hear(now) or self._opens_at == _NEVER or not self._num_short:
            return False
        head = next(iter(self._unstarted))
        num_left = head.num_prompt_tokens - self._num_computed_tokens(head, now)
        if head.is_long and num_left <= _LAST_STEP * self._steps.seconds(self._turn_of(head)) * self.prefill_rate:
            self._ending = head
        return self._ending is head

    def grow(self, flight: Flight, num_tokens: int) -> None:
        """So many more tokens of its output came."""
        expected, before = flight.num_expected_tokens, flight.num_output_tokens
        flight.num_output_tokens = after = before + num_tokens
        if after > expected or before > expected:
            self.num_tokens += max(expected, after) - max(expected, before)

    def resize_prompt(self, flight: Flight, num_prompt_tokens: int) -> None:
        """Its prompt turned out to have so many tokens."""
        more = num_prompt_tokens - flight.num_prompt_tokens
        flight.num_prompt_tokens += more
        self.num_tokens += more
        if flight in self._unstarted:
            self._count_unstarted(flight, 0, more)

    def end(self, flight: Flight) -> None:
        """It has ended, in whatever way."""
        if flight in self._unstarted:
            self._leave_unstarted(flight)
        del self._flights[flight]
        self.num_seats_taken -= flight.num_seats
        self.num_tokens -= flight.num_tokens

    def advance(self, now: float) -> None:
        """Silent requests that are due have started."""
        for flight in [flight for flight in self._silent if flight.due <= now]:
            self._leave_unstarted(flight)

    @property
    def next_due(self) -> float:
        """When to ask again although nothing happens: a silent request will have started, or a long prompt has its turn."""
        return min(self._opens_at, min((flight.due for flight in self._silent), default=_NEVER))

    def correct(self, gauges: Gauges, now: float) -> None:
        """Take in a report of the upstream; one that says what the last one said says nothing."""
        last, self._gauges = self._gauges, gauges
        if gauges == last:
            return
        if (last.num_preemptions or 0) < (gauges.num_preemptions or 0) and last.num_preemptions is not None:
            if now - self._shrank_at >= _CORRECTION_SECONDS:
                self._shrank_at = now
                self.kv_tokens = _SHRINKAGE * min(self.kv_tokens, max(self._peak_tokens, self.num_tokens) or _NEVER)
        elif self._holds_for_kv and gauges.kv_usage is not None and gauges.kv_usage < _ROOMY_CACHE:
            self.kv_tokens *= 1.1 if gauges.kv_usage > _EMPTY_CACHE else 1.25
        self._peak_tokens = self.num_tokens
        if gauges.num_waiting is None:
            return
        if gauges.num_waiting > max(len(self._unstarted), _MIN_UNSTARTED):
            self.batch_tokens = max(self.batch_tokens * 0.9, _SMALLEST_BATCH)
            self._rate.scale(0.8)
        elif gauges.num_waiting == 0 and self._holds_for_batch:
            self._rate.scale(_GROWTH)

    def _leave_unstarted(self, flight: Flight) -> None:
        del self._unstarted[flight]
        self._silent.pop(flight, None)
        self._count_unstarted(flight, -1, -flight.num_prompt_tokens)

    def _count_unstarted(self, flight: Flight, num: int, num_tokens: int) -> None:
        self.num_unstarted_tokens += num_tokens
        if not flight.is_long:
            self._num_short += num
            self._num_short_tokens += num_tokens

    def _learn_batch(self, now: float) -> None:
        """After a first chunk: grow if the upstream has nothing left to start, else shrink."""
        if now - self._last_start > _BURST_SECONDS:
            self._burst_at = now
        self._last_start = now
        if not self._holds_for_batch:
            self._aged_at = now
            return
        is_hungry = next(iter(self._unstarted)).sent_at >= self._burst_at if self._unstarted else True
        if is_hungry and self._grew_at < self._burst_at:
            self._grew_at = now
            self.batch_tokens = min(self.batch_tokens * _GROWTH, _LARGEST_BATCH)
        else:
            shrunk = self.batch_tokens * 0.5 ** ((now - self._aged_at) / _HALF_LIFE_SECONDS)
            self.batch_tokens = max(shrunk, _SMALLEST_BATCH)
        self._aged_at = now
