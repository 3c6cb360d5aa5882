"""Fill in the middle: how a model is asked for what stands between a text and its continuation, by tokens made for that."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

BEFORE, AFTER = "before", "after"
_FORMATS = (
    ("<|fim_prefix|>", BEFORE, "<|fim_suffix|>", AFTER, "<|fim_middle|>"),  # Qwen
    ("<fim_prefix>", BEFORE, "<fim_suffix>", AFTER, "<fim_middle>"),  # StarCoder, Granite
    ("<fim-prefix>", BEFORE, "<fim-suffix>", AFTER, "<fim-middle>"),
    ("<|code_prefix|>", BEFORE, "<|code_suffix|>", AFTER, "<|code_middle|>"),  # GLM
    ("<｜fim▁begin｜>", BEFORE, "<｜fim▁hole｜>", AFTER, "<｜fim▁end｜>"),  # noqa: RUF001 (DeepSeek)
    ("▁<PRE>", BEFORE, "▁<SUF>", AFTER, "▁<MID>"),  # Code Llama
    ("<PRE>", BEFORE, "<SUF>", AFTER, "<MID>"),
    ("[SUFFIX]", AFTER, "[PREFIX]", BEFORE),  # Codestral
)
"""As the models' authors write them, and llama.cpp."""

_ENDS = ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<|file_sep|>", "<|repo_name|>", "<EOT>", "▁<EOT>")
"""With which a model goes on when the middle is done."""


@dataclass(frozen=True, slots=True)
class FillInMiddle:
    """A model's way.

    Attributes:
        parts: of the prompt: token ids, and BEFORE and AFTER where the two texts go.
        stop_token_ids: that end the middle, besides the model's own.
    """

    parts: tuple[int | str, ...]
    stop_token_ids: frozenset[int]

    def prompt(self, before: Sequence[int], after: Sequence[int]) -> list[int]:
        """Token ids that ask for what stands between these two."""
        texts = {BEFORE: before, AFTER: after}
        return [i for part in self.parts for i in (texts[part] if isinstance(part, str) else (part,))]


def find_fill_in_middle(token_id: Callable[[str], int | None]) -> FillInMiddle | None:
    """By the tokens of a vocabulary; None where they are not all there."""
    for parts in _FORMATS:
        ids = {part: token_id(part) for part in parts if part not in (BEFORE, AFTER)}
        if None not in ids.values():
            marks = frozenset(i for i in (*ids.values(), *map(token_id, _ENDS)) if i is not None)
            return FillInMiddle(tuple(part if (i := ids.get(part)) is None else i for part in parts), marks)
    return None
