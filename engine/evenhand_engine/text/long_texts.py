"""Parts of long texts, for who need not tokenize all of one.

A tokenizer's ids become Python's in one go, and what it has made is freed in one go: for so long, 60 ms for a million tokens, Python
stands still, and with it every stream. So a text that may have many more tokens than are wanted is looked at in parts that grow.
"""

from collections.abc import Iterator

MARGIN = 64
"""Tokens beside a cut that may not be those of the whole text."""

_BYTES_PER_TOKEN = 5  # of the first part; text usually has four
_WORD_BYTES = 256  # within which a space is looked for, to cut at


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
