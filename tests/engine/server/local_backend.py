"""A local backend with a scripted core, and what it takes to follow its streams."""

import asyncio
import contextlib
from array import array
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import msgspec

from evenhand_engine.backends.backend import Delta, Ending, GenerationRequest, Stream
from evenhand_engine.backends.local import LocalBackend
from evenhand_engine.config import EngineConfig
from evenhand_engine.messages import (
    EngineStats,
)
from evenhand_engine.scheduler.request import FinishReason, RequestOutput, SamplingParams
from evenhand_engine.text.detokenizer import text_of
from evenhand_engine.text.text_decoder import TextDecoder, WindowDecoder
from evenhand_engine.text.tokenizer import Tokenizer

from .scripted_core import ScriptedCore, idle_stats


def ask(
    request_id: str, prompt: Iterable[int] = (1, 2, 3), *, max_tokens: int = 5, **options: Any
) -> GenerationRequest:
    return GenerationRequest(
        request_id=request_id,
        tenant_id="t",
        prompt_token_ids=array("I", prompt),
        sampling_params=SamplingParams(max_tokens=max_tokens),
        arrival_time=0.0,
        **options,
    )


@dataclass
class Notes:
    """An Observer that writes down what it is told."""

    started_with: int | None = None
    num_tokens: int = 0
    endings: list[Ending] = field(default_factory=list)
    has_ended: asyncio.Event = field(default_factory=asyncio.Event)

    def started(self, num_cached_tokens: int, now: float) -> None:
        assert self.started_with is None and not self.endings
        self.started_with = num_cached_tokens

    def generated(self, num_tokens: int, now: float) -> None:
        assert self.started_with is not None and not self.endings
        self.num_tokens += num_tokens

    def ended(self, ending: Ending, now: float) -> None:
        self.endings.append(ending)
        self.has_ended.set()


def output(request_id: str, *token_ids: int, finish: FinishReason | None = None) -> RequestOutput:
    return RequestOutput(request_id=request_id, token_ids=token_ids, finish_reason=finish)


def stats(step_id: int) -> EngineStats:
    return msgspec.structs.replace(idle_stats(""), step_id=step_id)


class Letters:
    """A tokenizer whose token ids are code points."""

    def text_decoder(self, context: Sequence[int], skip_special_tokens: bool) -> TextDecoder:
        return WindowDecoder(lambda token_ids: "".join(map(chr, token_ids)), context)


async def read(stream: Stream) -> AsyncIterator[Delta]:
    """Each delta as soon as there is one, until the last."""
    news, delta = asyncio.Event(), None
    stream.listen(news.set)
    while delta is None or delta.finish_reason is None:
        if (delta := stream.take()) is not None:
            yield delta
        else:
            news.clear()
            await news.wait()


@contextlib.asynccontextmanager
async def connected(core: ScriptedCore) -> AsyncIterator[LocalBackend]:
    backend = LocalBackend(*core.spawn(EngineConfig()))
    backend.tokenizer = cast(Tokenizer, Letters())
    try:
        yield backend
    finally:
        await backend.close()


async def collect(backend: LocalBackend, request_id: str) -> list[Delta]:
    return [delta async for delta in read(backend.generate(ask(request_id), Notes()))]


def text(deltas: Iterable[Delta]) -> str:
    return "".join(text_of(delta.pieces) for delta in deltas)
