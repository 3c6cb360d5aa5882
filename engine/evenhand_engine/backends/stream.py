"""LocalStream: one request's outputs as text, whether or not somebody reads them.

Outputs are detokenized and matched against stop strings as they arrive. What the reader has not taken is one record:
pieces of text, a count and perhaps an end. Memory grows by the bytes of the text alone, never by an object per token.
"""

import logging
from array import array
from collections.abc import Callable, Mapping, Sequence

from evenhand_engine.backends.backend import Delta, Ending, GenerationRequest, Observer, Say
from evenhand_engine.errors import EngineDeadError
from evenhand_engine.scheduler.request import FinishReason, RequestOutput, TokenLogprobs
from evenhand_engine.text.detokenizer import Detokenizer, Piece

log = logging.getLogger(__name__)

_MAX_PIECES = 64  # unread pieces that are kept apart, before they become one

Abort = Callable[[str, FinishReason, int | None], None]
"""End a request in the core: its id, the reason, and how many of its outputs count (None: all)."""


class LocalStream:
    """Deltas of one request to the engine core.

    Args:
        text: detokenizer of the output.
        abort: called at most once, to end the request before its time.
    """

    __slots__ = (
        "_abort",
        "_failure",
        "_finish_reason",
        "_generated",
        "_has_news",
        "_has_started",
        "_is_cut",
        "_is_open",
        "_listener",
        "_num_computed",
        "_num_passed",
        "_num_taken",
        "_num_tokens",
        "_observer",
        "_pieces",
        "_prompt_logprobs",
        "_request",
        "_say",
        "_spellings",
        "_text",
    )

    def __init__(self, request: GenerationRequest, observer: Observer, text: Detokenizer, abort: Abort) -> None:
        self._request = request
        self._observer = observer
        self._generated = observer.generated
        self._text = text
        self._abort = abort
        self._listener: Callable[[], None] = _ignore
        self._say: Say = _refuse
        self._spellings: Mapping[int, str | bytes] | None = None  # of the tokens whose text is offered to `_say`
        self._num_passed = 0  # outputs that have arrived and whose text was taken so
        self._num_computed = 0  # others that have arrived
        self._has_started = False
        self._is_cut = False
        self._is_open = True  # something may still come for the reader
        self._has_news = False
        self._pieces: list[Piece] = []
        self._prompt_logprobs: Sequence[TokenLogprobs] = ()
        self._num_taken = 0  # of these
        self._num_tokens = 0  # outputs that the reader has not been told of
        self._finish_reason: FinishReason | None = None
        self._failure: str | None = None

    # -- the reader's side

    @property
    def num_taken(self) -> int:
        return self._num_taken + self._num_passed

    def listen(self, listener: Callable[[], None]) -> None:
        self._listener = listener
        if self._has_news or self._failure is not None:
            listener()

    def pass_text(self, say: Say | None) -> None:
        is_level = say is not None and self._is_open and not self._has_news
        self._spellings = self._text.spellings if is_level else None
        self._say = say or _refuse

    def take(self) -> Delta | None:
        if not self._has_news:
            if self._failure is not None:
                raise EngineDeadError(self._failure)
            return None
        delta = Delta(self._pieces, self._num_tokens, self._finish_reason, self._prompt_logprobs, self._text.matched)
        self._num_taken += self._num_tokens
        self._has_news, self._pieces, self._num_tokens, self._prompt_logprobs = False, [], 0, ()
        if self._failure is not None:
            self._listener()  # it is still to be told
        return delta

    def finish(self) -> None:
        """End the request as if it had reached its limit, after the output that is being taken in."""
        self._is_cut = True

    def close(self) -> None:
        """End the request if it has not ended; nothing more can be taken."""
        if self._is_open and self._failure is None:
            self._abort(self._request.request_id, FinishReason.ABORT, None)
        self._is_open = self._has_news = False
        self._pieces, self._spellings = [], None
        self._listener = _ignore

    # -- the core's side

    def receive(self, output: RequestOutput, now: float) -> None:
        """One output of the core. After one with a finish reason nothing comes any more but `end` with the same."""
        token_ids, reason = output.token_ids, output.finish_reason
        num_tokens = len(token_ids)
        if not self._has_started and (reason is None or num_tokens or output.num_output_tokens):
            self._has_started = True
            self._observer.started(output.num_cached_tokens, now)
            self._has_news = self._is_open
        if num_tokens:
            generated = self._generated
            generated(num_tokens, now)
        if (spellings := self._spellings) is not None:
            if num_tokens == 1 and reason is None and not self._is_cut:
                text, say = spellings.get(token_ids[0]), self._say
                if text and isinstance(text, str) and say(text):
                    self._num_passed += 1
                    return
            self._spellings = None
        self._num_computed += num_tokens
        if self._is_open:
            try:
                self._read(output)
            except Exception:  # a fault of this text alone: the others' outputs are in the same message
                log.exception("an output cannot be read", extra={"fields": {"request_id": self._request.request_id}})
                self._end(FinishReason.ERROR, output)
        if self._has_news:
            listener = self._listener
            listener()

    def end(self, output: RequestOutput, now: float) -> None:
        """The output that was received last is the last one of all."""
        num_computed = max(self._num_passed + self._num_computed, output.num_output_tokens)
        self._observer.ended(Ending(output.finish_reason, num_computed, output.num_preemptions), now)

    def lose(self, failure: str, now: float) -> None:
        """The core is gone."""
        is_open = self._is_open
        if is_open:
            self._failure = failure
        self._observer.ended(Ending(None, self._num_passed + self._num_computed), now)
        if is_open:
            self._listener()

    def _read(self, output: RequestOutput) -> None:
        """Turn an output into news for the reader."""
        token_ids, reason, text = output.token_ids, output.finish_reason, self._text
        num_taken = text.num_tokens
        if output.prompt_logprobs:
            self._prompt_logprobs = output.prompt_logprobs
        hides_last = reason is FinishReason.STOP and not self._request.include_stop  # it counts but is not shown
        pieces = text.push(token_ids[:-1] if hides_last else token_ids, output.logprobs or None)
        if self._pieces:
            self._add(pieces)
        else:
            self._pieces = pieces
        if text.matched is not None:
            self._num_tokens += text.num_tokens - num_taken
            self._end(FinishReason.STOP, output, text.num_tokens)
        else:
            self._num_tokens += len(token_ids)
            if reason is not None or self._is_cut:
                self._add(text.flush())
                if hides_last and self._request.keep_stop_token:
                    self._add([Piece("", token_ids[-1:])])
                self._end(reason or FinishReason.LENGTH, output)
        if self._pieces:
            self._has_news = True

    def _end(self, reason: FinishReason, output: RequestOutput, num_output_tokens: int | None = None) -> None:
        """Nothing comes any more, whether or not the core has ended it; so many of its outputs count (None: all)."""
        self._is_open, self._has_news, self._finish_reason = False, True, reason
        if output.finish_reason is None:
            self._abort(self._request.request_id, reason, num_output_tokens)

    def _add(self, pieces: list[Piece]) -> None:
        self._pieces += pieces
        if len(self._pieces) > _MAX_PIECES and not any(piece.logprobs for piece in self._pieces):
            token_ids = array("I", (token_id for piece in self._pieces for token_id in piece.token_ids))
            self._pieces = [Piece("".join(piece.text for piece in self._pieces), token_ids)]


def _ignore() -> None: ...


def _refuse(_: str) -> bool:
    return False
