"""Log probabilities of output tokens in OpenAI's two shapes: one of chat, one of completions.

A token is written as its text, special ones too; where it is a part of a code point its text is replacement characters,
and `bytes` (of chat) has what it really is. With `as_ids` it is written as `token_id:` and its id, as vLLM does it for who must
tell tokens of equal text apart.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import msgspec

from evenhand_engine.scheduler.request import TokenLogprobs
from evenhand_engine.text.detokenizer import Piece
from evenhand_engine.text.tokenizer import Tokenizer

MIN_LOGPROB = -9999.0
"""Told instead of minus infinity, which JSON does not have; as vLLM's."""

_encode = msgspec.json.Encoder().encode


class _Spelling(NamedTuple):
    """A token's text, and as JSON its text and its bytes."""

    text: str
    token: msgspec.Raw
    bytes: msgspec.Raw


@functools.lru_cache(maxsize=2**15)  # a few megabytes
def _spelling(tokenizer: Tokenizer, token_id: int) -> _Spelling:
    data = tokenizer.token_bytes(token_id)
    text = data.decode("utf-8", "replace")
    return _Spelling(text, msgspec.Raw(_encode(text)), msgspec.Raw(_encode(list(data))))


class _Likely(msgspec.Struct, frozen=True, gc=False):
    """A token among the likeliest, of chat."""

    token: msgspec.Raw | str
    logprob: float
    bytes: msgspec.Raw


class _Chosen(msgspec.Struct, frozen=True, gc=False):
    """A token of the output, of chat."""

    token: msgspec.Raw | str
    logprob: float
    bytes: msgspec.Raw
    top_logprobs: list[_Likely]


def chat_logprobs(tokenizer: Tokenizer, pieces: Sequence[Piece], *, as_ids: bool = False) -> dict[str, Any]:
    """The `logprobs` of a chat choice, to be written as JSON."""

    def likely(token_id: int, logprob: float) -> _Likely:
        return _Likely(*_spelled(tokenizer, token_id, logprob, as_ids=as_ids))

    content = [
        _Chosen(
            *_spelled(tokenizer, token_id, found.logprob, as_ids=as_ids),
            [likely(*top) for top in zip(found.top_token_ids, found.top_logprobs, strict=True)],
        )
        for token_id, found in _tokens(pieces)
    ]
    return {"content": content, "refusal": None}


def _spelled(
    tokenizer: Tokenizer, token_id: int, logprob: float, *, as_ids: bool
) -> tuple[msgspec.Raw | str, float, msgspec.Raw]:
    _, token, data = _spelling(tokenizer, token_id)
    return _by_id(token_id) if as_ids else token, max(logprob, MIN_LOGPROB), data


def prompt_logprobs(
    tokenizer: Tokenizer, prompt: Sequence[int], told: Sequence[TokenLogprobs], num_top: int
) -> list[dict[str, Any] | None]:
    """vLLM's list: for each token of the prompt but the first, what is told of it and of `num_top` likely ones, by id."""

    def described(token_id: int, logprob: float, rank: int) -> dict[str, Any]:
        text = _spelling(tokenizer, token_id).text
        return {"logprob": max(logprob, MIN_LOGPROB), "rank": rank, "decoded_token": text}

    listed: list[dict[str, Any] | None] = [None]
    for token_id, found in zip(prompt[1:], told, strict=True):
        best = zip(found.top_token_ids[:num_top], found.top_logprobs, strict=False)
        top = {str(top_id): described(top_id, value, rank) for rank, (top_id, value) in enumerate(best, 1)}
        listed.append(top | {str(token_id): described(token_id, found.logprob, found.rank)})
    return listed


class CompletionLogprobs:
    """The `logprobs` of one completion's choice, which tells where in the text each token begins."""

    def __init__(self, tokenizer: Tokenizer, *, as_ids: bool = False) -> None:
        self._tokenizer = tokenizer
        self._as_ids = as_ids
        self._offset = 0

    def take(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """Of these tokens, which follow those of the last call."""
        return self._listed(_tokens(pieces))

    def take_prompt(self, prompt: Sequence[int], told: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """Of an echoed prompt, of whose first token nothing is told."""
        return self._listed(zip(prompt, (None, *told), strict=True))

    def _listed(self, tokens: Iterable[tuple[int, TokenLogprobs | None]]) -> dict[str, Any]:
        taken: dict[str, Any] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
        for token_id, found in tokens:
            text = self._text(token_id)
            token = _by_id(token_id) if self._as_ids else text
            taken["text_offset"].append(self._offset)
            taken["tokens"].append(token)
            taken["token_logprobs"].append(None if found is None else max(found.logprob, MIN_LOGPROB))
            taken["top_logprobs"].append(None if found is None else self._top(token, found))
            self._offset += len(text)
        return taken

    def _top(self, token: str, found: TokenLogprobs) -> dict[str, float] | None:
        best = zip(found.top_token_ids, found.top_logprobs, strict=True)
        top = {self._name(top_id): max(value, MIN_LOGPROB) for top_id, value in best}
        return top | {token: max(found.logprob, MIN_LOGPROB)} if top else None

    def _name(self, token_id: int) -> str:
        return _by_id(token_id) if self._as_ids else self._text(token_id)

    def _text(self, token_id: int) -> str:
        return _spelling(self._tokenizer, token_id).text


def _by_id(token_id: int) -> str:
    return f"token_id:{token_id}"


def token_ids_of(pieces: Sequence[Piece]) -> list[int]:
    return [token_id for piece in pieces for token_id in piece.token_ids]


def _tokens(pieces: Sequence[Piece]) -> Iterator[tuple[int, TokenLogprobs]]:
    for piece in pieces:
        yield from zip(piece.token_ids, piece.logprobs or (), strict=bool(piece.logprobs))
