"""LocalBackend: the engine core as a Backend. Its streams, and what the core said last.

Runs in the HTTP process's event loop; only the core decides when a request has ended, also one whose client is gone, since
until then it may be computed for.
"""

import asyncio
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

from evenhand_engine.backends.backend import GenerationRequest, ModelInfo, Observer
from evenhand_engine.backends.engine_client import CoreProcess, EngineClient
from evenhand_engine.backends.stream import LocalStream
from evenhand_engine.errors import EngineDeadError
from evenhand_engine.messages import AbortRequest, AddRequest, EngineStats, Reconfigure, StepOutputs
from evenhand_engine.scheduler.request import FinishReason
from evenhand_engine.text.detokenizer import Detokenizer
from evenhand_engine.text.tokenizer import Tokenizer
from evenhand_policy.config import SchedulerConfig

_CONTEXT_TOKENS = 8  # of the prompt that the detokenizer sees, for the spacing of the first word


class LocalBackend:
    """Generates in the engine core process at the other end of `connection`.

    Attributes:
        stats: see Backend.
        tokenizer: turns the core's token ids into text; must be set before the first request.
    """

    def __init__(self, process: CoreProcess, connection: Connection) -> None:
        self.stats: EngineStats | None = None
        self.tokenizer: Tokenizer | None = None
        self._client = EngineClient(process, connection, receive=self._receive, lost=self._lose)
        self._streams: dict[str, LocalStream] = {}  # of requests that the core has not ended
        self._num_elsewhere = 0  # requests that reach the core by other connections
        self._step_id = -1
        self._progress_at = time.monotonic()
        self._stats_listeners: list[Callable[[EngineStats], None]] = []

    async def start(self) -> ModelInfo:
        """Wait until the model is loaded; raises StartupError with the core's message if it cannot be."""
        await self._client.start()
        return self.info

    @property
    def info(self) -> ModelInfo:
        ready = self._client.ready
        assert ready is not None, "the backend has not started"
        return ModelInfo(
            model_name=ready.model_name,
            max_model_len=ready.max_model_len,
            num_kv_blocks=ready.num_kv_blocks,
            block_size=ready.block_size,
            dtype=ready.dtype,
            device=ready.device,
            knows_grammars=ready.knows_grammars,
            scores_prompts=ready.scores_prompts,
        )

    @property
    def failure(self) -> str | None:
        return self._client.failure

    @property
    def died(self) -> asyncio.Event:
        return self._client.died

    @property
    def num_in_flight(self) -> int:
        return len(self._streams) + self._num_elsewhere

    def on_stats(self, listener: Callable[[EngineStats], None]) -> None:
        self._stats_listeners.append(listener)

    def generate(self, request: GenerationRequest, observer: Observer) -> LocalStream:
        if self.failure is not None:
            raise EngineDeadError(self.failure)
        self._note_work()
        stream = LocalStream(request, observer, self._detokenizer(request), self._abort)
        self._streams[request.request_id] = stream
        self._client.send(
            AddRequest(
                request_id=request.request_id,
                tenant_id=request.tenant_id,
                prompt_token_ids=request.prompt_token_ids.tobytes(),
                sampling_params=request.sampling_params,
                arrival_time=request.arrival_time,
                user=request.user,
                priority=request.priority,
            )
        )
        return stream

    def count_elsewhere(self, change: int) -> None:
        """So many more requests, or fewer, are in flight that reach the core by other connections."""
        if change > 0:
            self._note_work()
        self._num_elsewhere += change

    def _note_work(self) -> None:
        if not self.num_in_flight:
            self._progress_at = time.monotonic()

    def _detokenizer(self, request: GenerationRequest) -> Detokenizer:
        assert self.tokenizer is not None, "the backend has no tokenizer"
        context = request.prompt_token_ids[-_CONTEXT_TOKENS:]
        return Detokenizer(
            self.tokenizer.text_decoder(context, request.skip_special_tokens),
            request.stop,
            include_stop=request.include_stop,
            min_tokens=request.sampling_params.min_tokens,
        )

    def _abort(self, request_id: str, reason: FinishReason, num_output_tokens: int | None) -> None:
        self._client.send(AbortRequest(request_id=request_id, reason=reason, num_output_tokens=num_output_tokens))

    def reconfigure(self, config: SchedulerConfig, num_replicas: int = 1) -> None:
        self._client.send(Reconfigure(config=config, num_replicas=num_replicas))

    def seconds_without_progress(self, now: float) -> float:
        """By outputs and step ids."""
        return now - self._progress_at if self.num_in_flight else 0.0

    async def close(self, timeout: float = 5.0) -> None:
        """Ask the core to end, then kill it; returns when its process is gone."""
        await self._client.close(timeout)

    def _receive(self, message: StepOutputs, now: float) -> None:
        """What all say goes first, then what is noted of those that end, which takes as long as some tokens."""
        if message.outputs:
            self._progress_at = now
        ended = []
        for output in message.outputs:
            if (stream := self._streams.get(output.request_id)) is not None:
                stream.receive(output, now)
                if output.finish_reason is not None:
                    del self._streams[output.request_id]
                    ended.append((stream, output))
        for stream, output in ended:
            stream.end(output, now)
        if message.stats is not None:
            self._take_stats(message.stats, now)

    def _take_stats(self, stats: EngineStats, now: float) -> None:
        if stats.step_id != self._step_id:
            self._step_id = stats.step_id
            self._progress_at = now
        self.stats = stats
        for listener in self._stats_listeners:
            listener(stats)

    def _lose(self) -> None:
        streams, self._streams = self._streams, {}
        failure, now = self.failure or "the engine core is gone", time.monotonic()
        for stream in streams.values():
            stream.lose(failure, now)
