"""Calls of a model's output, character by character: what becomes certain of one as its text comes. Pure."""

import json
import re
from typing import NamedTuple, Protocol


class Content(NamedTuple):
    """Text that is no call."""

    text: str


class CallStart(NamedTuple):
    """The next call begins."""

    name: str


class Arguments(NamedTuple):
    """More of the JSON of the last call's arguments."""

    text: str


Event = Content | CallStart | Arguments

_NAMED = re.compile(r"([A-Za-z0-9_.-]{1,64})(?:\[CALL_ID\]\w{1,64})?(?:\[ARGS\])?\s*")
_MAX_HEAD = 160  # characters before the arguments


class Call(Protocol):
    """One call that is being read.

    Attributes:
        name: None until it is told.
        text: all that was read of it.
        has_arguments: some of them were told.
        is_complete: the next character is no part of it.
    """

    name: str | None
    text: str
    has_arguments: bool
    is_complete: bool

    def push(self, text: str) -> tuple[list[CallStart | Arguments], int]:
        """Events, and how many characters belong to the call."""
        ...


class ObjectCall:
    """One JSON object, which holds name and arguments."""

    def __init__(self, arguments: str) -> None:
        self.name: str | None = None
        self.text = ""
        self.has_arguments = False
        self.is_complete = False
        self._argument_keys = {arguments, "arguments", "parameters"}
        self._depth = 0
        self._is_string = self._is_escaped = False
        self._key: str | None = None  # whose value is being read
        self._part = ""  # of a key or of a value
        self._early = ""  # arguments that could not be told as they came

    def push(self, text: str) -> tuple[list[CallStart | Arguments], int]:
        """Events, and how many characters belong to the object."""
        events: list[CallStart | Arguments] = []
        streamed = ""
        num_before = len(self.text)
        for letter in text:
            self.text += letter
            is_streamed = self._streams()
            self._take(letter, events)
            if is_streamed and self._streams():
                streamed += letter
            if self.is_complete:
                break
        if not self.has_arguments:
            streamed = streamed.lstrip()
        if streamed:
            self.has_arguments = True
            events.append(Arguments(streamed))
        return events, len(self.text) - num_before

    def _streams(self) -> bool:
        """Whether characters are arguments that can be told as they come: those of an object, after the name."""
        return self.name is not None and self._key in self._argument_keys and not self._part.startswith('"')

    def _take(self, letter: str, events: list[CallStart | Arguments]) -> None:
        if self._is_string:
            self._part += letter
            self._is_string = letter != '"' or self._is_escaped
            self._is_escaped = letter == "\\" and not self._is_escaped
            return
        if letter == '"':
            self._is_string = True
        elif letter in "{[":
            self._depth += 1
            if self._depth == 1:
                return
        elif letter in "}]":
            self._depth -= 1
            if self._depth == 0:
                self._end_value(events)
                self.is_complete = True
                return
        elif self._depth == 1 and letter == ":" and self._key is None:
            self._key, self._part = _string(self._part), ""
            return
        elif self._depth == 1 and letter == ",":
            self._end_value(events)
            return
        if letter.strip() or self._part:
            self._part += letter

    def _end_value(self, events: list[CallStart | Arguments]) -> None:
        key, value = self._key, self._part.strip()
        streamed = self._streams()
        self._key, self._part = None, ""
        if key == "name" and self.name is None:
            self.name = _string(value)
            events.append(CallStart(self.name))
        elif key in self._argument_keys and not streamed and not self.has_arguments:
            self._early = _string(value) if value.startswith('"') else value
        if self.name is not None and self._early:
            self.has_arguments = True
            events.append(Arguments(self._early))
            self._early = ""


class NamedCall:
    """A name, then one JSON object, which holds the arguments alone; between them may be marks, as of Mistral's newer models.

    What begins otherwise is no call: it is complete without a name.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.text = ""
        self.has_arguments = False
        self.is_complete = False
        self._depth = 0
        self._is_string = self._is_escaped = False

    def push(self, text: str) -> tuple[list[CallStart | Arguments], int]:
        """Events, and how many characters belong to the call."""
        num_before = len(self.text)
        events: list[CallStart | Arguments] = []
        if self.name is None:
            self.name, text = self._read_name(text)
            if self.name is None:
                return events, len(self.text) - num_before
            events.append(CallStart(self.name))
        arguments = text[: self._length(text)]
        self.text += arguments
        if arguments:
            self.has_arguments = True
            events.append(Arguments(arguments))
        return events, len(self.text) - num_before

    def _read_name(self, text: str) -> tuple[str | None, str]:
        """Takes what stands before the arguments. The name, if it is told by now, and what is left."""
        window = (self.text + text)[:_MAX_HEAD]
        head, brace, _ = window.partition("{")
        match = _NAMED.fullmatch(head)
        left = text[len(head) - len(self.text) :]
        self.text = head
        name = match[1] if match and brace else None
        self.is_complete = name is None and (bool(brace) or len(window) == _MAX_HEAD)
        return name, left

    def _length(self, text: str) -> int:
        """How many of these characters belong to the object."""
        for number, letter in enumerate(text, 1):
            if self._is_string:
                self._is_string = letter != '"' or self._is_escaped
                self._is_escaped = letter == "\\" and not self._is_escaped
                continue
            self._is_string = letter == '"'
            self._depth += (letter in "{[") - (letter in "}]")
            if self._depth == 0:
                self.is_complete = True
                return number
        return len(text)


def _string(text: str) -> str:
    """Of a JSON string; what is none is taken as it is."""
    try:
        value = json.loads(text)
    except ValueError:
        return text.strip().strip('"')
    return value if isinstance(value, str) else text
