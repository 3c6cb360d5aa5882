"""MessageReader: the assistant's message of a chat, from its text: reasoning, content and tool calls, whole or in deltas."""

import secrets
import string
from typing import Any

from evenhand_engine.openai.tools import Tools
from evenhand_engine.text.reasoning import ReasoningParser, Split
from evenhand_engine.text.tool_call_objects import Arguments, CallStart, Content, Event
from evenhand_engine.text.tool_calls import ToolCallParser

_LETTERS = string.ascii_letters + string.digits


class MessageReader:
    """Reads one choice.

    Args:
        tools: None: all text is content.
        reasoning: None: there is none.
        shows_reasoning: else it is left out.
    """

    def __init__(self, tools: Tools | None, reasoning: ReasoningParser | None, *, shows_reasoning: bool) -> None:
        self._tools = tools
        self._parser = None if tools is None else ToolCallParser(tools.form)
        self._reasoning = reasoning
        self._shows_reasoning = shows_reasoning

    @property
    def is_text(self) -> bool:
        """Whether all text is content, as it comes."""
        return self._parser is None and self._reasoning is None

    @property
    def has_calls(self) -> bool:
        return self._parser is not None and self._parser.num_calls > 0

    def finish_reason(self, reason: str | None) -> str | None:
        """A named function's call ends as a text does, as OpenAI's."""
        is_called = reason == "stop" and self.has_calls and self._tools is not None and not self._tools.is_named
        return "tool_calls" if is_called else reason

    def delta(self, text: str, *, is_last: bool) -> dict[str, Any]:
        """What this text adds to the message."""
        split = Split("", text) if self._reasoning is None else self._reasoning.push(text, is_last=is_last)
        events = self._events(split.content, is_last=is_last)
        content = "".join(event.text for event in events if isinstance(event, Content))
        found: dict[str, Any] = {"content": content} if content else {}
        if split.reasoning and self._shows_reasoning:
            found |= {"reasoning": split.reasoning, "reasoning_content": split.reasoning}
        if calls := self._calls(events):
            found["tool_calls"] = calls
        return found

    def message(self, text: str) -> dict[str, Any]:
        """All of it."""
        delta = self.delta(text, is_last=True)
        calls = delta.get("tool_calls", [])
        content = delta.get("content")
        message = {"role": "assistant", "content": content if calls else content or ""}
        if self._reasoning is not None:
            message |= {name: delta.get(name) for name in ("reasoning", "reasoning_content")}
        if calls:
            message["tool_calls"] = [{name: value for name, value in call.items() if name != "index"} for call in calls]
        return message

    def _events(self, text: str, *, is_last: bool) -> list[Event]:
        if self._parser is None:
            return [Content(text)]
        return self._parser.push(text) + (self._parser.flush() if is_last else [])

    def _calls(self, events: list[Event]) -> list[dict[str, Any]]:
        """Of each call what is new: an id and the name at its beginning, then arguments."""
        if self._parser is None or self._tools is None:
            return []
        calls: dict[int, dict[str, Any]] = {}
        index = self._parser.num_calls - sum(isinstance(event, CallStart) for event in events) - 1
        for event in events:
            if isinstance(event, CallStart):
                index += 1
                function = {"name": event.name, "arguments": ""}
                calls[index] = {"index": index, "id": self._new_id(), "type": "function", "function": function}
            elif isinstance(event, Arguments):
                call = calls.setdefault(index, {"index": index, "function": {"arguments": ""}})
                call["function"]["arguments"] += event.text
        return [call for index, call in calls.items() if index == 0 or self._tools.is_parallel]

    def _new_id(self) -> str:
        length = None if self._tools is None else self._tools.form.id_length
        if length is None:
            return f"call_{secrets.token_hex(12)}"
        return "".join(secrets.choice(_LETTERS) for _ in range(length))
