"""The answer of an endpoint that is a chat in other words: its one message as an object, or as the events that build it."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from aiohttp import web

from evenhand_engine.backends.backend import Delta
from evenhand_engine.errors import Refusal
from evenhand_engine.frontend.engine_service import ENGINE
from evenhand_engine.frontend.keys import TENANT_ID
from evenhand_engine.openai.chat import ReadChat, message_reader
from evenhand_engine.openai.deltas import Deltas
from evenhand_engine.openai.events import Event, EventStream, First, answer_in_events, named_events
from evenhand_engine.openai.generation import Generation, begin
from evenhand_engine.openai.messages import MessageReader
from evenhand_engine.openai.responses import json_response
from evenhand_engine.openai.stream import log_usage
from evenhand_engine.openai.structure import check_structure
from evenhand_engine.text.detokenizer import text_of


class MessageForm(Protocol):
    """How one endpoint writes a message. Fed with deltas as `MessageReader` makes them; `last` is the stream's last."""

    def opening(self) -> Iterable[Event]:
        """What stands first, before it is known whether the request will run."""
        ...

    def begin(self) -> Iterable[Event]:
        """What stands next: it runs."""
        ...

    def take(self, delta: dict[str, Any]) -> Iterable[Event]:
        """What a delta of the message changes."""
        ...

    def end(self, last: Delta) -> Iterable[Event]: ...

    def fail(self, refusal: Refusal) -> Event:
        """There is no more."""
        ...

    def whole(self, last: Delta) -> dict[str, Any]:
        """All that was taken, as an object."""
        ...


MakeForm = Callable[[Sequence[Generation], MessageReader], MessageForm]


async def answer_message(
    request: web.Request, asked: ReadChat, make_form: MakeForm, *, num_taken: int, is_streamed: bool
) -> web.StreamResponse:
    """Generate what a chat asks for, and write its message. `num_taken`: see `begin`. Raises Refusal, EngineDeadError."""
    service, tenant_id, chat = request.app[ENGINE], request[TENANT_ID], asked.body
    await check_structure(service, tenant_id, asked.structure)
    prompts, limit = [asked.prompt], chat.max_completion_tokens
    async with begin(service, tenant_id, chat, prompts, asked.params, limit, num_taken=num_taken) as generations:
        reader = message_reader(service, asked)
        answer = _Answer(Deltas(generations, service.door), reader, make_form(generations, reader))
        try:
            if not is_streamed:
                return await answer.whole()
            return await answer_in_events(request, answer.deltas, answer.write, answer.fail)
        finally:
            log_usage(request, generations)


class _Answer:
    def __init__(self, deltas: Deltas, reader: MessageReader, form: MessageForm) -> None:
        self.deltas = deltas
        self._reader = reader
        self._form = form
        self._last = Delta()

    async def whole(self) -> web.Response:
        texts: list[str] = []

        def take(_: int, delta: Delta) -> bool:
            self._last = delta
            texts.append(text_of(delta.pieces))
            return True

        await self.deltas.hand_on(take)
        self._form.take(self._reader.delta("".join(texts), is_last=True))
        return json_response(self._form.whole(self._last))

    async def write(self, events: EventStream, first: First) -> None:
        await events.write(named_events(self._form.opening()))
        index, delta = await first
        await events.write(named_events(self._form.begin()) + self._render(index, delta))
        await events.hand_on(self.deltas, lambda index, delta: events.put(self._render(index, delta)))
        await events.write(named_events(self._form.end(self._last)))

    def fail(self, refusal: Refusal) -> bytes:
        return named_events([self._form.fail(refusal)])

    def _render(self, _: int, delta: Delta) -> bytes:
        self._last = delta
        is_last = delta.finish_reason is not None
        return named_events(self._form.take(self._reader.delta(text_of(delta.pieces), is_last=is_last)))
