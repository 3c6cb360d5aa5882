"""Intake: a body as it comes in, so that no size of it holds the event loop. Pure.

What is small is joined and read as it is. What is large stays the pieces in which it came, and is looked at as they come: what is read
in the end is its skeleton.
"""

from evenhand_engine.sidecar.body import Body, is_json_object, refusing_what_is_no_json
from evenhand_engine.sidecar.skeleton import Skeleton

_LARGE_BYTES = 256 * 1024
_HEAD_BYTES = 8  # by these one sees whether it may be a JSON object


class Intake:
    """Takes in one body.

    Args:
        says_json: so its headers say, or its beginning.

    Attributes:
        num_bytes: that came.
    """

    def __init__(self, *, says_json: bool) -> None:
        self.num_bytes = 0
        self._says_json = says_json
        self._head = b""
        self._pieces: list[bytes] = []
        self._skeleton: Skeleton | None = None

    @property
    def _is_json(self) -> bool:
        return self._says_json or is_json_object(self._head)

    def take(self, piece: bytes) -> None:
        """What came next. Raises Refusal 400 and 413 where it cannot be looked at."""
        self.num_bytes += len(piece)
        self._pieces.append(piece)
        if len(self._head) < _HEAD_BYTES:
            self._head += (piece if self._head else piece.lstrip())[: _HEAD_BYTES - len(self._head)]
        if self.num_bytes <= _LARGE_BYTES or not self._is_json:
            return
        with refusing_what_is_no_json():
            if self._skeleton is None:
                self._skeleton = Skeleton()
                for earlier in self._pieces[:-1]:
                    self._skeleton.feed(earlier)
            self._skeleton.feed(piece)

    def body(self) -> Body:
        """All of it, and what is dear to learn of it. Raises Refusal 400 and 413."""
        if self._skeleton is not None:
            with refusing_what_is_no_json():
                self._skeleton.complete()
            body = Body(self._skeleton.text, skeleton=self._skeleton, pieces=self._pieces)
        elif self._is_json:
            body = Body(b"".join(self._pieces))
        else:
            body = Body(b"", is_json=False, pieces=self._pieces)
        body.learn()
        return body
