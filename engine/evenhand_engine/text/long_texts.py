"""Parts of long texts and of what a tokenizer has made of them.

An encoding's ids become Python's in one go: for so long, 30 ms for a million tokens, Python stands still, and with it every
stream. So a tokenizer divides what is long into encodings of `PART_TOKENS`, while Python goes on, and their ids are read one by one.
And a text that may have many more tokens than are wanted is looked at in parts that grow.
"""

from collections.abc import Iterator

import tokenizers

MARGIN = 64
"""Tokens beside a cut that may not be those of the whole text."""

PART_TOKENS = 65_536
"""Of an encoding; its ids take 1 ms."""

_BYTES_PER_TOKEN = 5  # of the first part; text usually has four
_WORD_BYTES = 256  # within which a space is looked for, to cut at


def token_ids(encoding: tokenizers.Encoding) -> list[int]:
    """Of an encoding that goes on in what overflows it: each part has the special tokens around it that belong around the whole."""
    ids: list[int] = encoding.ids
    if not (more := encoding.overflowing):
        return ids
    mask: list[int] = encoding.special_tokens_mask
    before, after = mask.index(0), mask[::-1].index(0)
    end = ids[len(ids) - after :]
    del ids[len(ids) - after :]
    for part in more:
        ids += part.ids[before : len(part) - after]
    return ids + end


def beginnings(text: bytes, num_tokens: int) -> Iterator[str]:
    """Ever longer beginnings, all shorter than the text; of none, if so many tokens are likely to be all of it."""
    for size in _sizes(text, num_tokens):
        yield text[:size].decode(errors="ignore")


def ends(text: bytes, num_tokens: int) -> Iterator[str]:
    """The same of its end, from a space on where there is one near."""
    for size in _sizes(text, num_tokens):
        start = len(text) - size
        space = text.find(b" ", start, start + _WORD_BYTES)
        yield text[max(start, space) :].decode(errors="ignore")


def _sizes(text: bytes, num_tokens: int) -> Iterator[int]:
    size = _BYTES_PER_TOKEN * (num_tokens + 2 * MARGIN)
    while size < len(text):
        yield size
        size *= 2
