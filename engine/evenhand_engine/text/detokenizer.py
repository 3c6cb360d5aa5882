"""Detokenizer: the text of one request's output, token by token.

Never splits a code point, and never shows a character that may belong to a stop string. Pure: it owns its few
characters of state, is fed by the server's stream and knows neither HTTP nor the engine.
"""

from collections.abc import Callable, Sequence

_REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are not (yet) a code point
_MAX_HELD_CHARACTERS = 3  # a code point has at most four bytes, so at most three can be waiting for the last
_MAX_WINDOW_TOKENS = 64  # after so many tokens without a clean end the bytes are no text: show them as they are


class IncrementalDecoder:
    """Turns token ids into text as they come.

    Decoders look at neighbours (a leading space, a byte of a longer code point), so each step decodes a short window
    of recent tokens and shows what the window has gained. Concatenated, the pieces equal what the decoding of all
    tokens adds to that of `context`, the end of the prompt.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], context: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window = list(context)
        self._num_settled = len(context)  # tokens at the window's start whose text is out: context for what follows
        self._num_shown = len(decode(self._window)) if context else 0  # characters of the window's text that are out

    def push(self, token_id: int) -> str:
        """The characters that `token_id` completes."""
        self._window.append(token_id)
        text = self._decode(self._window)
        if text.endswith(_REPLACEMENT) and len(self._window) < _MAX_WINDOW_TOKENS:
            stable = text.rstrip(_REPLACEMENT)
            piece = text[self._num_shown : max(len(stable), len(text) - _MAX_HELD_CHARACTERS)]
            self._num_shown += len(piece)
            return piece
        piece = text[self._num_shown :]
        self._num_shown = max(self._num_shown, len(text))
        if piece:
            self._settle()
        return piece

    def flush(self) -> str:
        """What is still held back: the bytes of a code point that never ended."""
        piece = self._decode(self._window)[self._num_shown :]
        self._num_shown += len(piece)
        return piece

    def _settle(self) -> None:
        self._window = self._window[self._num_settled :]
        self._num_settled = len(self._window)
        self._num_shown = len(self._decode(self._window))


class StopMatcher:
    """Cuts text at the first stop string to be complete, however the text is divided into pieces."""

    def __init__(self, stop: Sequence[str], include_stop: bool = False) -> None:
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._held = ""  # a suffix of the text so far that may begin a stop string
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """The characters that are certainly not part of a stop string; nothing more once one has matched."""
        text = self._held + text
        matches = [(at + len(stop), at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if matches:
            end, start, self.matched = min(matches)
            self._held = ""
            return text[: end if self._include_stop else start]
        num_held = max((_overlap(text, stop) for stop in self._stop), default=0)
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
    """Text of one output, with stop strings.

    Args:
        decode: text of a list of token ids.
        stop: strings at which the text ends; not part of it unless `include_stop`.
        min_tokens: stop strings that end within so many tokens do not count.
        context: the last few tokens of the prompt, so that a word's leading space is kept.

    Attributes:
        num_tokens: tokens taken so far, up to and with the one that completed a stop string.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        stop: Sequence[str] = (),
        *,
        include_stop: bool = False,
        min_tokens: int = 0,
        context: Sequence[int] = (),
    ) -> None:
        self._decoder = IncrementalDecoder(decode, context)
        self._matcher = StopMatcher(stop, include_stop)
        self._min_tokens = min_tokens
        self.num_tokens = 0

    @property
    def stopped(self) -> bool:
        """A stop string has been seen: the text is complete."""
        return self._matcher.matched is not None

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens add; tokens after a stop string are ignored."""
        pieces: list[str] = []
        for token_id in token_ids:
            if self.stopped:
                break
            self.num_tokens += 1
            piece = self._decoder.push(token_id)
            pieces.append(piece if self.num_tokens < self._min_tokens else self._matcher.push(piece))
        return "".join(pieces)

    def flush(self) -> str:
        """The end of the text, when generation ended otherwise than by a stop string."""
        return "" if self.stopped else self._matcher.push(self._decoder.flush()) + self._matcher.flush()
