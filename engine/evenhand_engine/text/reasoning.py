"""Reasoning in an output's text, between `<think>` and `</think>`, apart from its content, as the text comes. Pure."""

from typing import NamedTuple

from evenhand_engine.text.tool_calls import overlap

BEGIN, END = "<think>", "</think>"
PARSERS = {"deepseek_r1": True, "qwen3": False}
"""By name, whether an output begins as reasoning, since the chat template has opened it."""


class Split(NamedTuple):
    """What some text is made of."""

    reasoning: str
    content: str


class ReasoningParser:
    """Reads one output.

    Args:
        starts_inside: it begins as reasoning, whether or not it says so.
    """

    def __init__(self, *, starts_inside: bool) -> None:
        self._text = ""
        self._is_inside = starts_inside
        self._is_at_start = True
        self._has_reasoned = False
        self._is_over = False  # there is one block of reasoning, at the beginning

    def push(self, text: str, *, is_last: bool = False) -> Split:
        """What these characters make certain; with `is_last` all that was held back too."""
        self._text += text
        reasoning = content = ""
        if self._is_at_start and not self._begin(is_last=is_last):
            return Split("", "")
        if self._is_inside:
            reasoning = self._read_reasoning(is_last=is_last)
        if not self._is_inside:
            content, self._text = self._text, ""
            if not self._is_over:
                content = content.lstrip("\n")
                self._is_over = bool(content)
        return Split(reasoning, content)

    def _begin(self, *, is_last: bool) -> bool:
        """Whether it is known how the output begins."""
        text = self._text.lstrip()
        if not is_last and BEGIN.startswith(text[: len(BEGIN)]) and len(text) < len(BEGIN):
            return False
        if text.startswith(BEGIN):
            self._is_inside, self._text = True, text[len(BEGIN) :]
        elif not self._is_inside:
            self._is_over = True
        self._is_at_start = False
        return True

    def _read_reasoning(self, *, is_last: bool) -> str:
        if not self._has_reasoned:
            self._text = self._text.lstrip("\n")
            self._has_reasoned = bool(self._text)
        reasoning, found, rest = self._text.partition(END)
        if found:
            self._is_inside, self._text = False, rest
            return reasoning
        num_held = 0 if is_last else overlap(reasoning, END)
        self._text = reasoning[len(reasoning) - num_held :]
        return reasoning[: len(reasoning) - num_held]
