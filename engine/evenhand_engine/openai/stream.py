"""Answers to completions and chat completions: one JSON object, or server-sent events as the tokens come."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import msgspec
from aiohttp import web

from evenhand_engine.backends.backend import Delta, Say
from evenhand_engine.errors import Refusal
from evenhand_engine.frontend.door import DOOR
from evenhand_engine.frontend.event_writer import EventWriter
from evenhand_engine.frontend.keys import LOG_FIELDS
from evenhand_engine.openai.deltas import Deltas
from evenhand_engine.openai.errors import error_body
from evenhand_engine.openai.events import EventStream, First, answer_in_events, data_event
from evenhand_engine.openai.generation import Generation
from evenhand_engine.openai.responses import json_response
from evenhand_engine.openai.schema import SamplingFields
from evenhand_engine.scheduler.request import FinishReason, TokenLogprobs
from evenhand_engine.text.detokenizer import Piece, text_of

_FINISH_REASONS = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}

_MARK = "\0text\0"  # which stands in no name

_encode = msgspec.json.Encoder().encode


class Format(Protocol):
    """How one endpoint writes its answers. A choice's `index` is that of its generation."""

    @property
    def is_text(self) -> bool:
        """Whether a choice of a stream says its text and no more, so that all are alike but for that."""
        ...

    def envelope(self, *, streamed: bool) -> dict[str, Any]:
        """The fields that every object of one answer shares."""
        ...

    def opening(self, index: int) -> dict[str, Any] | None:
        """The choice that a stream begins with, just before its first token: whoever takes the time to that takes the time
        to the first event. None for none."""
        ...

    def choice(
        self,
        index: int,
        pieces: Sequence[Piece],
        finish_reason: str | None,
        *,
        streamed: bool,
        prompt_logprobs: Sequence[TokenLogprobs] = (),
    ) -> dict[str, Any]:
        """One choice: all of its text, or what a delta adds."""
        ...

    def additions(self, prompt_logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """More fields of an answer as a whole, or of the first event, by what is told of its first prompt."""
        ...


def usage(generations: Sequence[Generation]) -> dict[str, Any]:
    """A prompt counts once, however many choices continue it."""
    first_choices = [generation for generation in generations if generation.choice_index == 0]
    num_prompt_tokens = sum(generation.num_prompt_tokens for generation in first_choices)
    num_output_tokens = sum(generation.num_output_tokens for generation in generations)
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_output_tokens,
        "total_tokens": num_prompt_tokens + num_output_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(generation.num_cached_tokens for generation in first_choices)},
    }


async def answer(
    request: web.Request, body: SamplingFields, generations: Sequence[Generation], form: Format
) -> web.StreamResponse:
    """Read the generations and write their text in the endpoint's format."""
    deltas = Deltas(generations, request.app[DOOR])
    try:
        if not body.stream:
            return await _answer_whole(body, generations, deltas, form)
        events = _Events(body, generations, deltas, form)
        return await answer_in_events(request, deltas, events.write, _fail, end=b"data: [DONE]\n\n")
    finally:
        log_usage(request, generations)


def log_usage(request: web.Request, generations: Sequence[Generation]) -> None:
    """In the access log's line of this request."""
    used = usage(generations)
    request[LOG_FIELDS].update(
        prompt_tokens=used["prompt_tokens"],
        cached_tokens=used["prompt_tokens_details"]["cached_tokens"],
        output_tokens=used["completion_tokens"],
    )


async def _answer_whole(
    body: SamplingFields, generations: Sequence[Generation], deltas: Deltas, form: Format
) -> web.Response:
    pieces: list[list[Piece]] = [[] for _ in generations]
    reasons: list[str | None] = [None] * len(generations)
    told: list[Sequence[TokenLogprobs]] = [()] * len(generations)

    def take(index: int, delta: Delta) -> bool:
        pieces[index] += delta.pieces
        reasons[index] = _reason(delta)
        told[index] = delta.prompt_logprobs or told[index]
        return True

    await deltas.hand_on(take)
    chosen = _best(pieces, body.num_generated, body.n or 1)
    choices = [
        form.choice(index, pieces[i], reasons[i], streamed=False, prompt_logprobs=told[i])
        for index, i in enumerate(chosen)
    ]
    answer = {**form.envelope(streamed=False), "choices": choices, "usage": usage(generations)}
    return json_response({**answer, **form.additions(told[0])})


def _best(pieces: list[list[Piece]], num_generated: int, num_chosen: int) -> list[int]:
    """Of each prompt's choices those whose tokens were the likeliest in the mean, best first; all, if all are wanted."""
    if num_generated == num_chosen:
        return list(range(len(pieces)))

    def mean(index: int) -> float:
        told: list[float] = [found.logprob for piece in pieces[index] for found in piece.logprobs or ()]
        return sum(told) / max(1, len(told))

    groups = (range(first, first + num_generated) for first in range(0, len(pieces), num_generated))
    return [index for group in groups for index in sorted(group, key=mean, reverse=True)[:num_chosen]]


class _Around(NamedTuple):
    """What stands around each text of one choice, and who writes one between; None: nobody can but by the whole event."""

    before: bytes
    after: bytes
    say: Say | None


class _Events:
    """The events of one answer. What they share is rendered once."""

    _put: EventWriter  # once it is written

    __slots__ = (
        "_around",
        "_body",
        "_deltas",
        "_envelope",
        "_form",
        "_generations",
        "_has_opened",
        "_head",
        "_is_text",
        "_put",
    )

    def __init__(self, body: SamplingFields, generations: Sequence[Generation], deltas: Deltas, form: Format) -> None:
        self._body = body
        self._generations = generations
        self._deltas = deltas
        self._form = form
        self._envelope = form.envelope(streamed=True)
        self._head = b'data: %b,"choices":[' % _encode(self._envelope)[:-1]
        self._is_text = form.is_text and not body.includes_continuous_usage
        self._around: list[_Around] = []  # each choice's text, where they are text
        self._has_opened = False

    async def write(self, events: EventStream, first: First) -> None:
        await events.write(self._render(*await first))
        self._put = events.put
        if self._is_text:  # now, as the first token is still awaited
            self._around = [self._find_around(index) for index in range(len(self._generations))]
        await events.hand_on(self._deltas, self._take)
        if self._body.includes_usage:
            await events.write(data_event({**self._envelope, "choices": [], "usage": usage(self._generations)}))

    def _opening(self) -> bytes:
        """Nothing, once it was sent."""
        if self._has_opened:
            return b""
        self._has_opened = True
        more, events = self._form.additions(()), b""
        for index in range(len(self._generations)):
            if (choice := self._form.opening(index)) is not None:
                events += self._event(choice, more)
                more = {}
        return events

    def _take(self, index: int, delta: Delta) -> bool:
        """Of a delta that is text and no more, nothing but that is rendered; of what follows by who writes such text, not even this
        is called."""
        pieces, put = delta.pieces, self._put
        if self._is_text and delta.finish_reason is None and pieces:
            text = pieces[0].text if len(pieces) == 1 else text_of(pieces)
            if text:
                before, after, say = self._around[index]
                keeps_up = put(self._opening() + before + _encode(text) + after)
                if keeps_up and say is not None:
                    self._deltas.pass_text(index, say)
                return keeps_up
        return put(self._render(index, delta))

    def _render(self, index: int, delta: Delta) -> bytes:
        if delta.finish_reason is None and not delta.pieces:
            return b""
        opening = self._opening()
        choice = self._form.choice(index, delta.pieces, _reason(delta), streamed=True)
        if choice["finish_reason"] is None or "tool_calls" not in choice.get("delta", ()):
            return opening + self._event(choice)
        end = {"index": index, "delta": {}, "logprobs": None, "finish_reason": choice["finish_reason"]}
        call = self._event({**choice, "finish_reason": None})  # OpenAI's client sees no end beside one
        return opening + call + self._event(end)

    def _find_around(self, index: int) -> _Around:
        event = self._event(self._form.choice(index, [Piece(_MARK)], None, streamed=True))
        before, after = event.split(_encode(_MARK))
        return _Around(before, after, self._put.between(before, after, self._deltas.fill))

    def _event(self, choice: dict[str, Any], more: Mapping[str, Any] = {}) -> bytes:
        """With one choice; `more`: other fields of it."""
        if self._body.includes_continuous_usage:
            more = {"usage": usage(self._generations), **more}
        elif self._body.includes_usage:
            more = {"usage": None, **more}
        tail = b",%b" % _encode(more)[1:] if more else b"}"
        return b"%b%b]%b\n\n" % (self._head, _encode(choice), tail)


def _reason(delta: Delta) -> str | None:
    return None if delta.finish_reason is None else _FINISH_REASONS[delta.finish_reason]


def _fail(refusal: Refusal) -> bytes:
    return data_event(error_body(refusal))
