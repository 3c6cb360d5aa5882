"""An engine core over an emulated device, of which each call fails once, one after the other, while it serves requests of all kinds."""

import functools
import gc
import queue
import weakref
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import torch
from llguidance import LLMatcher
from torch import Tensor

from evenhand_engine.core.connections import Connections
from evenhand_engine.core.device_runner import DeviceRunner
from evenhand_engine.core.device_sampling import SamplingStep, StepSampler
from evenhand_engine.core.device_seats import DeviceSeats
from evenhand_engine.core.engine import EngineCore
from evenhand_engine.core.followers import Follower
from evenhand_engine.core.prompt_logprobs import PromptLogprobs
from evenhand_engine.core.structures import Structures
from evenhand_engine.messages import AbortRequest, AddRequest
from evenhand_engine.scheduler.batch import Batch, Runner
from evenhand_engine.scheduler.request import FinishReason, RequestOutput, Sampled, SamplingParams
from evenhand_kernels.cuda import variants
from evenhand_kernels.cuda.source import Variant
from evenhand_kernels.cuda.work import AttentionWork
from evenhand_kernels.device import Event, Graph, Launch

from .device_engine import PROMPTS, SETTINGS, CountingDevice, Model

PARTS: tuple[tuple[type[Any], str], ...] = (
    (DeviceSeats, "take_in"),
    (StepSampler, "take_in"),
    (PromptLogprobs, "begin"),
    (Structures, "begin"),
    (DeviceSeats, "lay_out"),
    (DeviceSeats, "write_new_blocks"),
    (AttentionWork, "write"),
    (DeviceRunner, "_send"),
    (DeviceRunner, "_forward"),
    (Follower, "masks"),
    (StepSampler, "sample"),
    (SamplingStep, "_read"),
    (Follower, "advance"),
)
"""Of a step, on the host."""
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drawn": {"temperature": 1.0, "seed": 3, "num_logprobs": 2},
    "penalized": {"frequency_penalty": 0.5, "logit_bias": ((9, 2.0),), "num_prompt_logprobs": 1},
    "guided": {"bad_words_token_ids": ((20, 21), (22,))},
    "aborted": {"max_tokens": 40},
}
NUM_OUTPUTS = 5
NUM_WAITING = 2


class Calls:
    """What may fail: calls in the order in which one step makes them. Whichever has not failed yet does, when it is time for it."""

    def __init__(self) -> None:
        self.failed: list[tuple[str, str, int]] = []
        self.is_time = False
        self._part = ""
        self._made: Counter[str] = Counter()

    def begin(self, part: str) -> None:
        """Of a step."""
        self._part = part
        self._made.clear()

    def come_to(self, place: str) -> None:
        call = self._part, place, self._made[place]
        self._made[place] += 1
        if self.is_time and call not in self.failed:
            self.is_time = False
            self.failed.append(call)
            kind = torch.OutOfMemoryError if len(self.failed) % 2 else RuntimeError
            raise kind(str(call))

    def wrap(self, place: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call, assigned=())
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.come_to(place)
            return call(*args, **kwargs)

        return wrapped


class FailingDevice(CountingDevice):
    """Each thing that is asked of it may fail. Remembers which pinned memory is alive."""

    def __init__(self, calls: Calls) -> None:
        super().__init__()
        self.calls = calls
        self.made: list[weakref.ref[Tensor]] = []

    def load(self, variant: Variant) -> Launch:
        if variant.num_threads == variants.SAMPLING_THREADS:
            variant = replace(variant, num_threads=128)  # of which the emulation runs each
        return self.calls.wrap("launch", super().load(variant))

    def pinned(self, *shape: int, dtype: torch.dtype) -> Tensor:
        self.calls.come_to("pinned")
        memory = super().pinned(*shape, dtype=dtype)
        self.made.append(weakref.ref(memory))
        return memory

    @property
    def num_alive(self) -> int:
        gc.collect()
        return sum(memory() is not None for memory in self.made)

    def record(self) -> Event:
        self.calls.come_to("record")
        event = super().record()
        return cast(Event, SimpleNamespace(wait=self.calls.wrap("wait", event.wait), done=event.done))

    def capture(self, work: Callable[[], None]) -> Graph:
        return cast(Graph, SimpleNamespace(replay=self.calls.wrap("replay", super().capture(work).replay)))


class Watched:
    """Implements `Runner`: another one, and which requests were in a step that failed."""

    def __init__(self, runner: Runner, calls: Calls) -> None:
        self.core: EngineCore | None = None
        self.failed: set[str] = set()
        self._runner, self._calls = runner, calls
        self._in_flight: deque[set[str]] = deque()

    @property
    def pipeline_depth(self) -> int:
        return self._runner.pipeline_depth

    def submit(self, batch: Batch) -> None:
        assert self.core is not None
        requests = {request.request_id for request in self.core._scheduler._in_flight[-1].requests}
        with self._noting("submit", requests):
            self._runner.submit(batch)
        self._in_flight.append(requests)

    def collect(self) -> list[Sampled]:
        with self._noting("collect", self._in_flight.popleft()):
            return self._runner.collect()

    @contextmanager
    def _noting(self, part: str, requests: set[str]) -> Iterator[None]:
        self._calls.begin(part)
        try:
            yield
        except Exception:
            self.failed |= requests
            raise


class Served:
    """An engine core over the model, whose loop the test turns; what came of each request, named by its kind and a number."""

    def __init__(self, model: Model, calls: Calls, make_matcher: Callable[[], LLMatcher]) -> None:
        assert isinstance(model.on_device, DeviceRunner)
        self.device, self._runner = model.device, model.on_device
        self._make_matcher = make_matcher
        self.tokens: dict[str, list[int]] = {}
        self.ends: dict[str, FinishReason] = {}
        self._watched = Watched(model.on_device, calls)
        self.structures = model.structures[model.on_device]
        connections = SimpleNamespace(commands=queue.SimpleQueue(), publish=self._publish, owner_reads=False)
        self.core = EngineCore(SETTINGS, self._watched, cast(Connections, connections), structures=self.structures)
        self._watched.core = self.core
        self._num_added = 0

    def add(self, kind: str) -> None:
        name, self._num_added = f"{kind} {self._num_added}", self._num_added + 1
        if kind == "guided":
            self.structures.add(name, self._make_matcher())
        self.core._execute(add(name, PROMPTS[list(KINDS).index(kind)], **KINDS[kind]))

    def add_more(self, kinds: list[str]) -> None:
        """So that somebody waits who is in no step yet."""
        while self.core._scheduler.request_table.num_waiting < NUM_WAITING:
            self.add(kinds[self._num_added % len(kinds)])

    def abort_one(self) -> None:
        """That is in flight, if there is one to be aborted."""
        for step in list(self.core._scheduler._in_flight)[-1:]:
            for request in step.requests:
                if request.request_id.startswith("aborted") and request.num_output_tokens:
                    return self.core._execute(AbortRequest(request_id=request.request_id, reason=FinishReason.ABORT))

    def finish(self) -> None:
        while self.core._scheduler.request_table.requests or self.core._in_flight:
            self.core._advance()

    @property
    def failed(self) -> set[str]:
        """Requests that were in a step that failed."""
        return self._watched.failed

    def assert_nothing_is_left(self) -> None:
        table = self.core._scheduler.request_table
        table.check_integrity()
        assert not table.requests and not table.num_running
        assert table.blocks.num_free_blocks == SETTINGS.num_kv_blocks
        assert not self._runner._steps and len(self._runner._host) == self._runner.pipeline_depth + 1
        assert not self.structures._compiled and not self.core._in_flight

    def _publish(self, outputs: list[RequestOutput], stats: object = None) -> None:
        for output in outputs:
            assert output.request_id not in self.ends, "it has ended before"
            self.tokens.setdefault(output.request_id, []).extend(output.token_ids)
            if output.finish_reason is not None:
                self.ends[output.request_id] = output.finish_reason


def add(name: str, prompt: list[int], **params: Any) -> AddRequest:
    sampling = SamplingParams(**({"max_tokens": NUM_OUTPUTS, "temperature": 0} | params))
    return AddRequest(
        request_id=name,
        tenant_id="t",
        prompt_token_ids=array("I", prompt).tobytes(),
        sampling_params=sampling,
        arrival_time=0.0,
    )
