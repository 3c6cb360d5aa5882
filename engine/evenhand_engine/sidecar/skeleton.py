"""Skeleton: a JSON text without the inside of its long strings, so that what is left of a large body is read as fast as a small one. Pure.

    {"url": "data:image/png;base64,iVBORw0KGgoAAAANSUhEUg…"}  ▶  {"url": "data:image/png;base64,iVBORw0KGgoAAAAN<mark>"}

A text is looked at in blocks as it comes, and no block takes long. One that lies inside a string, begins and ends between two of its
characters, and is valid there, becomes a mark that no client can guess; a blank one outside of strings becomes one blank. What is read of
the rest is thus what would be read of the whole, and a mark in it stands for bytes that nobody need look at.
"""

import re
import secrets

import msgspec

from evenhand_engine.errors import Refusal

_BLOCK_BYTES = 4096
_STEP_BYTES = 16 * _BLOCK_BYTES  # looked at in one go, and what came with them
_ESCAPE_BYTES = 12  # of the longest escape: a pair of surrogates
_SHOWN_BYTES = 256  # of what is left out: by these one sees what it is
_CUTS = range(0, 256, 13)  # from the end of a block, where it may be cut; characters of up to four bytes do not fit in
_MAX_BYTES = 8 * 2**20  # of a skeleton
_MAX_VALUES = 800_000  # as in the engine: they are decoded in one go, in which Python stands still


class Skeleton:
    """Takes in a text piece by piece; `text` is what is left of it, once it is `complete`.

    Raises Refusal 400 and 413 where more is left than may be read in one go, and msgspec's errors where a string is none.

    Attributes:
        text: the skeleton.
    """

    def __init__(self) -> None:
        self.text = b""
        self._mark = secrets.token_hex(12).encode()
        self._marks = re.compile(self._mark + rb"(\d{8})")
        self._parts: list[bytes] = []
        self._holes: list[bytes] = []
        self._left = b""  # came, and was not looked at yet
        self._is_inside = False  # a string, where the next block begins
        self._follows_hole = False
        self._num_bytes = self._num_values = 0

    def feed(self, piece: bytes) -> None:
        """What came next."""
        self._left += piece
        if len(self._left) >= _STEP_BYTES:
            step, self._left = self._left, b""
            self._look_at(step)

    def complete(self) -> None:
        """Nothing more comes."""
        step, self._left = self._left, b""
        self._look_at(step, is_last=True)
        self.text, self._parts = b"".join(self._parts), []

    def size(self, text: bytes) -> int:
        """Bytes of a part of the skeleton, or of what was made of it, with what its marks stand for."""
        return len(text) + sum(len(self._hole(mark)) - len(mark[0]) for mark in self._marks.finditer(text))

    def has_mark(self, text: bytes) -> bool:
        """Whether some of it was left out."""
        return self._mark in text

    def expand(self, text: bytes) -> list[bytes]:
        """The same with what its marks stand for, in pieces."""
        pieces, start = list[bytes](), 0
        for mark in self._marks.finditer(text):
            pieces += text[start : mark.start()], self._hole(mark)
            start = mark.end()
        return [*pieces, text[start:]]

    def _hole(self, mark: re.Match[bytes]) -> bytes:
        return self._holes[int(mark[1])]

    def _look_at(self, step: bytes, *, is_last: bool = False) -> None:
        """Each block begins where no escape is halfway through."""
        start = 0
        while start + _BLOCK_BYTES <= len(step) or (is_last and start < len(step)):
            block = step[start : start + _BLOCK_BYTES]
            if (len(block) - len(block.rstrip(b"\\"))) % 2 and len(block) > 1:
                block = block[:-1]  # the other half of the escape is in the next
            start += len(block)
            self._take_block(block)
        self._left = step[start:]

    def _take_block(self, block: bytes) -> None:
        if not self._is_inside and not block.strip():
            self._keep(b" ")
            return
        bare = block.replace(rb"\\", b"").replace(rb"\"", b"") if b"\\" in block else block
        num_quotes = bare.count(b'"')
        if self._is_inside and num_quotes == 0 and self._leave_out(block):
            return
        self._follows_hole = False
        self._is_inside ^= num_quotes % 2 == 1
        self._keep(block)

    def _leave_out(self, block: bytes) -> bool:
        """Leave out as much of the inside of a string as begins and ends between two of its characters."""
        shown = 2 * _ESCAPE_BYTES if self._follows_hole else _SHOWN_BYTES
        starts = (shown + cut for cut in _CUTS)
        start = next((p for p in starts if _is_between(block, p)), None)
        end = next((p for cut in _CUTS if _is_between(block, p := len(block) - cut)), None)
        if start is None or end is None or end - start < _BLOCK_BYTES // 2:
            return False
        hole = block[start:end]
        msgspec.json.decode(b'"' + hole + b'"', type=msgspec.Raw)
        self._keep(block[:start] + self._mark + b"%08d" % len(self._holes))
        self._keep(block[end:])
        self._holes.append(hole)
        self._follows_hole = True
        return True

    def _keep(self, part: bytes) -> None:
        self._parts.append(part)
        self._num_bytes += len(part)
        self._num_values += sum(map(part.count, (b",", b"[", b"{", b"\\")))
        if self._num_values > _MAX_VALUES:  # some may be in texts
            message = f"The body holds more than {_MAX_VALUES} commas, brackets, braces and escapes."
            raise Refusal(400, "invalid_value", message)
        if self._num_bytes > _MAX_BYTES:
            message = (
                f"The body has more than {_MAX_BYTES} bytes beside the inside of its long texts, pictures and sounds."
            )
            raise Refusal(413, "request_too_large", message)


def _is_between(block: bytes, position: int) -> bool:
    """Whether no character, no escape, nor a pair of escapes, reaches over this position."""
    is_first = block[position] & 0xC0 != 0x80 if position < len(block) else block[-1] < 0x80
    return is_first and b"\\" not in block[max(0, position - _ESCAPE_BYTES) : position]
