"""Detokenizer: the text of one request's output, token by token.

Never splits a code point, and never shows a character that may belong to a stop string. Pure: it owns its few
characters of state, is fed as tokens arrive and knows neither HTTP nor the engine.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from evenhand_engine.text.text_decoder import TextDecoder


class Piece(msgspec.Struct, frozen=True, gc=False):
    """Text that is certain, with the tokens whose text begins in it.

    Attributes:
        token_ids: of one piece after the other they are the output's, but for a stop token that is not shown and for
            tokens that lie beyond a stop string as a whole.
        logprobs: what came along with each of `token_ids`, handed through unseen (the engine's are
            `TokenLogprobs`); None where nothing did.
    """

    text: str
    token_ids: Sequence[int] = ()
    logprobs: Sequence[Any] | None = None


def text_of(pieces: Sequence[Piece]) -> str:
    return pieces[0].text if len(pieces) == 1 else "".join(piece.text for piece in pieces)


class StopMatcher:
    """Cuts text at the first stop string to be complete, however the text is divided into pieces."""

    __slots__ = (
        "_held",
        "_include_stop",
        "_stop",
        "matched",
    )

    def __init__(self, stop: Sequence[str], include_stop: bool = False) -> None:
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._held = ""  # a suffix of the text so far that may begin a stop string
        self.matched: str | None = None

    def push(self, text: str, *, counts: bool = True) -> str:
        """The characters that are certainly not part of a stop string; nothing more once one has matched.

        A stop string that ends within text that does not count is none, but one may begin there.
        """
        if not self._stop:
            return text
        num_old, text = len(self._held), self._held + text
        starts = [(stop, text.find(stop, max(0, num_old + 1 - len(stop)))) for stop in self._stop] if counts else []
        matches = [(at + len(stop), at, stop) for stop, at in starts if at >= 0]
        if matches:
            end, start, self.matched = min(matches)
            self._held = ""
            return text[: end if self._include_stop else start]
        num_held = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def flush(self) -> str:
        """What was held back for a stop string that did not come."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


class Detokenizer:
    """Text of one output, with stop strings, in pieces that keep their tokens.

    Args:
        decoder: turns token ids into text as they come; nobody else uses it.
        stop: strings at which the text ends; not part of it unless `include_stop`.
        min_tokens: stop strings that end within so many tokens do not count; one that begins there may end later.

    Attributes:
        num_tokens: tokens taken so far, up to and with the one that completed a stop string.
        matched: the stop string that was seen.
    """

    __slots__ = (
        "_decoder",
        "_has_stop",
        "_held",
        "_matcher",
        "_min_tokens",
        "_num_decoded",
        "_num_shown",
        "matched",
        "num_tokens",
    )

    def __init__(
        self,
        decoder: TextDecoder,
        stop: Sequence[str] = (),
        *,
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self._decoder = decoder
        self._matcher = StopMatcher(stop, include_stop)
        self._has_stop = bool(stop)
        self._min_tokens = min_tokens
        self._num_decoded = 0  # characters, from anywhere on
        self._num_shown = 0  # of these
        self._held: deque[tuple[int, int, Any]] = deque()  # (first character, token id, log probabilities)
        self.matched: str | None = None
        self.num_tokens = 0

    @property
    def stopped(self) -> bool:
        """A stop string has been seen: the text is complete."""
        return self.matched is not None

    @property
    def spellings(self) -> Mapping[int, str | bytes] | None:
        """The text of each token, had it come now, as far as it is known: then that need not be pushed. None: it depends on others."""
        return None if self._has_stop or self._held else self._decoder.spellings

    def push(self, token_ids: Sequence[int], logprobs: Sequence[Any] | None = None) -> list[Piece]:
        """The text that these tokens make certain; tokens after a stop string are ignored.

        `logprobs` holds something for each token, which comes out with it; in all calls for an output or in none.
        """
        pieces: list[Piece] = []
        for index, token_id in enumerate(token_ids):
            if self.matched is not None:
                break
            self.num_tokens += 1
            text = self._decoder.push(token_id)
            if text and not self._has_stop and not self._held:  # nothing can be held back: the usual case, so short
                pieces.append(Piece(text, (token_id,), None if logprobs is None else (logprobs[index],)))
                continue
            self._held.append((self._num_decoded, token_id, None if logprobs is None else logprobs[index]))
            self._num_decoded += len(text)
            if shown := self._match(text):
                pieces.append(self._piece(shown))
        return pieces

    def _match(self, text: str) -> str:
        shown = self._matcher.push(text, counts=self.num_tokens > self._min_tokens)
        self.matched = self._matcher.matched
        return shown

    def flush(self) -> list[Piece]:
        """The end of the text, when generation ended otherwise than by a stop string."""
        if self.stopped:
            return []
        rest = self._decoder.flush()
        self._num_decoded += len(rest)
        shown = self._match(rest)
        piece = self._piece(shown + self._matcher.flush(), everything=not self.stopped)
        return [piece] if piece.text or piece.token_ids else []

    def _piece(self, shown: str, *, everything: bool = False) -> Piece:
        """`shown`, with the held tokens that begin before its end."""
        self._num_shown += len(shown)
        token_ids, logprobs = [], []
        while self._held and (everything or self._held[0][0] < self._num_shown):
            _, token_id, logprob = self._held.popleft()
            token_ids.append(token_id)
            logprobs.append(logprob)
        return Piece(shown, token_ids, logprobs if any(logprob is not None for logprob in logprobs) else None)
