"""Log probabilities of output tokens in OpenAI's two shapes: one of chat, one of completions.

A token is written as its text, special ones too; where it is a part of a code point its text is replacement characters,
and `bytes` (of chat) has what it really is.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from evenhand_engine.scheduler.request import TokenLogprobs
from evenhand_engine.text.detokenizer import Piece
from evenhand_engine.text.tokenizer import Tokenizer

MIN_LOGPROB = -9999.0
"""Told instead of minus infinity, which JSON does not have; as vLLM's."""


def chat_logprobs(tokenizer: Tokenizer, pieces: Sequence[Piece]) -> dict[str, Any]:
    """The `logprobs` of a chat choice."""

    def described(token_id: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token_id)
        return {"token": data.decode("utf-8", "replace"), "logprob": max(logprob, MIN_LOGPROB), "bytes": list(data)}

    content = [
        described(token_id, found.logprob)
        | {"top_logprobs": [described(*top) for top in zip(found.top_token_ids, found.top_logprobs, strict=True)]}
        for token_id, found in _tokens(pieces)
    ]
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """The `logprobs` of one completion's choice, which tells where in the text each token begins."""

    def __init__(self, tokenizer: Tokenizer, offset: int = 0) -> None:
        """`offset`: characters of the text before the first token."""
        self._tokenizer = tokenizer
        self._offset = offset

    def take(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """Of these tokens, which follow those of the last call."""
        taken: dict[str, Any] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
        for token_id, found in _tokens(pieces):
            token, logprob = self._text(token_id), max(found.logprob, MIN_LOGPROB)
            best = zip(found.top_token_ids, found.top_logprobs, strict=True)
            top = {self._text(top_id): max(value, MIN_LOGPROB) for top_id, value in best}
            taken["text_offset"].append(self._offset)
            taken["token_logprobs"].append(logprob)
            taken["tokens"].append(token)
            taken["top_logprobs"].append(top | {token: logprob} if top else None)
            self._offset += len(token)
        return taken

    def _text(self, token_id: int) -> str:
        return self._tokenizer.token_bytes(token_id).decode("utf-8", "replace")


def _tokens(pieces: Sequence[Piece]) -> Iterator[tuple[int, TokenLogprobs]]:
    for piece in pieces:
        yield from zip(piece.token_ids, piece.logprobs or (), strict=bool(piece.logprobs))
