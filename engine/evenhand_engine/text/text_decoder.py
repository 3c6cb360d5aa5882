"""TextDecoder: turns the token ids of one output into text as they come, and never splits a code point.

`ByteDecoder` where each token stands for bytes of its own, as GPT-2's and its many heirs' do; `WindowDecoder` for all others,
at some ten times the price.
"""

import codecs
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

_REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are not (yet) a code point
_MAX_HELD_CHARACTERS = 3  # a code point has at most four bytes, so at most three can be waiting for the last
_MAX_WINDOW_TOKENS = 64  # after so many tokens without a clean end the bytes are no text: show them as they are
_MAX_CONTEXT_TOKENS = 8  # of what is out already, for the spacing of what follows


class TextDecoder(Protocol):
    """One output's: the texts that it returns, one after the other, are the output's.

    Attributes:
        spellings: of each token the text that it would have now, or its bytes where these may be a part of a code point, as far as
            they are known; None where the text depends on other tokens.
    """

    @property
    def spellings(self) -> Mapping[int, str | bytes] | None: ...

    def push(self, token_id: int) -> str:
        """The characters that `token_id` completes."""
        ...

    def flush(self) -> str:
        """What is still held back: the bytes of a code point that never ended."""
        ...


class ByteDecoder:
    """Where a token's bytes do not depend on its neighbours.

    Args:
        spellings: of each token its text, or its bytes where these may be a part of a code point.
        context: the end of the prompt, whose last bytes may begin a code point.
    """

    __slots__ = (
        "_held",
        "_spellings",
    )

    def __init__(self, spellings: Mapping[int, str | bytes], context: Sequence[int] = ()) -> None:
        self._spellings = spellings
        self._held = b""  # the beginning of a code point: at most three bytes
        for token_id in context[-_MAX_CONTEXT_TOKENS:]:
            self.push(token_id)

    @property
    def spellings(self) -> Mapping[int, str | bytes] | None:
        return None if self._held else self._spellings

    def push(self, token_id: int) -> str:
        spelling = self._spellings[token_id]
        if isinstance(spelling, str):
            if not self._held:
                return spelling
            spelling = spelling.encode()
        data = self._held + spelling
        text, num_used = codecs.utf_8_decode(data, "replace", False)
        self._held = data[num_used:]
        return text

    def flush(self) -> str:
        held, self._held = self._held, b""
        return held.decode(errors="replace")


class WindowDecoder:
    """For any decoder.

    Decoders look at neighbours (a leading space, a byte of a longer code point), so each step decodes a short window
    of recent tokens and shows what the window has gained. Concatenated, the pieces equal what the decoding of all
    tokens adds to that of `context`, the end of the prompt.
    """

    spellings: Mapping[int, str | bytes] | None = None

    def __init__(self, decode: Callable[[Sequence[int]], str], context: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window = list(context[-_MAX_CONTEXT_TOKENS:])
        self._num_settled = len(self._window)  # tokens at its start whose text is out: context for what follows
        self._text = decode(self._window) if self._window else ""
        self._num_shown = len(self._text)  # characters of the window's text that are out

    def push(self, token_id: int) -> str:
        """The characters that `token_id` completes."""
        self._window.append(token_id)
        text = self._decode(self._window)
        if not text.endswith(_REPLACEMENT):
            return self._skip() if text == self._text else self._show(text)
        if len(self._window) >= _MAX_WINDOW_TOKENS:
            return self._show(text)
        self._text = text
        stable = text.rstrip(_REPLACEMENT)
        piece = text[self._num_shown : max(len(stable), len(text) - _MAX_HELD_CHARACTERS)]
        self._num_shown += len(piece)
        return piece

    def flush(self) -> str:
        """What is still held back: the bytes of a code point that never ended."""
        piece = self._text[self._num_shown :]
        self._num_shown += len(piece)
        return piece

    def _skip(self) -> str:
        """The newest token has added nothing, as a special one that is not shown: what follows does not depend on it.

        Where there is no text at all before it, it may be a space that shows only between others, so it is context.
        """
        if self._text:
            self._window.pop()
        else:
            self._window = self._window[-_MAX_CONTEXT_TOKENS:]
            self._num_settled = len(self._window)
        return ""

    def _show(self, text: str) -> str:
        """All of the window's text; its newest tokens become the context of what follows."""
        piece = text[self._num_shown :]
        self._window = self._window[self._num_settled :][-_MAX_CONTEXT_TOKENS:]
        self._num_settled = len(self._window)
        self._text = self._decode(self._window)
        self._num_shown = len(self._text)
        return piece
