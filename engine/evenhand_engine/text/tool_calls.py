"""Tool calls in an output's text: what is content, and what is a call of a function with its arguments, as the text comes.

Models write calls in formats of their own; each is data here (`ToolFormat`). Pure: fed with pieces of text, of any size.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a model writes calls. Each is a JSON object with a name and arguments.

    Attributes:
        name: as `--tool-call-parser` has it.
        markers: what calls begin with, the one to write first. Empty: calls are the output from its beginning, or none are.
        end: what follows one call; shown to nobody.
        arguments: the member that holds the arguments.
        begin, between, close: what is written before the first call, between two and after the last.
        id_length: letters and digits of a call's id, where templates insist on a number; None: any.
    """

    name: str
    markers: tuple[str, ...]
    end: str = ""
    arguments: str = "arguments"
    begin: str = ""
    between: str = ""
    close: str = ""
    id_length: int | None = None


FORMATS = {
    form.name: form
    for form in (
        ToolFormat(
            "hermes",
            ("<tool_call>",),
            end="</tool_call>",
            begin="\n",
            between="\n</tool_call>\n<tool_call>\n",
            close="\n</tool_call>",
        ),
        ToolFormat("llama3_json", (), arguments="parameters", between="; "),
        ToolFormat("mistral", ("[TOOL_CALLS]",), begin=" [", between=", ", close="]", id_length=9),
        ToolFormat("granite", ("<|tool_call|>", "<tool_call>"), begin="[", between=", ", close="]"),
    )
}


def detect_format(template: str) -> ToolFormat | None:
    """The format that a chat template teaches; None if it takes no tools or none that is known."""
    if "tools" not in template:
        return None
    for name, sign in (
        ("mistral", "[TOOL_CALLS]"),
        ("granite", "<|tool_call|>"),
        ("hermes", "<tool_call>"),
        ("llama3_json", '"parameters":'),
    ):
        if sign in template:
            return FORMATS[name]
    return None


_SEPARATORS = " \t\r\n[],;"


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


class ToolCallParser:
    """Reads one output.

    Attributes:
        num_calls: that have begun.
    """

    def __init__(self, form: ToolFormat) -> None:
        self.num_calls = 0
        self._form = form
        self._text = ""  # that may be the beginning of a marker
        self._blank = ""  # white space that is content only if some follows
        self._call: _Call | None = None
        self._is_inside = False  # between the marker of calls and what is none of them
        self._is_at_start = True

    def push(self, text: str) -> list[Event]:
        """What these characters make certain."""
        self._text += text
        return list(self._read(is_last=False))

    def flush(self) -> list[Event]:
        """The end: what was held back is content, a call without an end ends."""
        return list(self._read(is_last=True))

    def _read(self, *, is_last: bool) -> Iterator[Event]:
        while self._text:
            num_left = len(self._text)
            if self._call is not None:
                yield from self._read_call(self._call)
            elif self._is_inside:
                yield from self._read_between(is_last=is_last)
            else:
                yield from self._read_content(is_last=is_last)
            if len(self._text) == num_left:
                break
        if is_last and self._call is not None:
            yield from self._end_call(self._call, is_whole=False)

    def _read_call(self, call: "_Call") -> Iterator[Event]:
        events, num_taken = call.push(self._text)
        self._text = self._text[num_taken:]
        for event in events:
            self.num_calls += isinstance(event, CallStart)
            yield event
        if call.is_complete:
            yield from self._end_call(call, is_whole=True)

    def _end_call(self, call: "_Call", *, is_whole: bool) -> Iterator[Event]:
        """What never said its name is content."""
        self._call = None
        if call.name is None:
            yield Content(call.text)
        elif is_whole and not call.has_arguments:
            yield Arguments("{}")

    def _read_between(self, *, is_last: bool) -> Iterator[Event]:
        """White space, brackets, separators and ends before the next call; anything else is content again."""
        self._text = text = self._text.lstrip(_SEPARATORS)
        marks = [mark for mark in (self._form.end, *self._form.markers) if mark]
        if text.startswith("{"):
            self._call = _Call(self._form.arguments)
            yield from self._read_call(self._call)
        elif seen := [mark for mark in marks if text.startswith(mark)]:
            self._text = text[len(max(seen)) :]
        elif text and (is_last or not any(mark.startswith(text) for mark in marks)):
            self._is_inside = False
            yield from self._read_content(is_last=is_last)

    def _read_content(self, *, is_last: bool) -> Iterator[Event]:
        markers = self._form.markers
        if not markers:
            yield from self._read_bare(is_last=is_last)
            return
        found = [(at, marker) for marker in markers if (at := self._text.find(marker)) >= 0]
        if found:
            at, marker = min(found)
            yield from self._content(self._text[:at])
            self._text, self._is_inside, self._blank = self._text[at + len(marker) :], True, ""
            return
        num_held = 0 if is_last else max(overlap(self._text, marker) for marker in markers)
        yield from self._content(self._text[: len(self._text) - num_held])
        self._text = self._text[len(self._text) - num_held :]

    def _read_bare(self, *, is_last: bool) -> Iterator[Event]:
        """Without markers an output that begins like an object is calls, and no other."""
        text = self._text.lstrip()
        if self._is_at_start and text.startswith("{"):
            self._is_inside, self._blank = True, ""
            yield from self._read_between(is_last=is_last)
        elif text or is_last:
            yield from self._content(self._text)
            self._text = ""

    def _content(self, text: str) -> Iterator[Event]:
        """White space beside calls is no content."""
        self._is_at_start = self._is_at_start and not text.strip()
        text = self._blank + text
        shown = text.rstrip()
        self._blank = text[len(shown) :]
        if shown:
            yield Content(shown)


class _Call:
    """One JSON object, character by character."""

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

    def push(self, text: str) -> "tuple[list[CallStart | Arguments], int]":
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

    def _take(self, letter: str, events: "list[CallStart | Arguments]") -> None:
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

    def _end_value(self, events: "list[CallStart | Arguments]") -> None:
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


def _string(text: str) -> str:
    """Of a JSON string; what is none is taken as it is."""
    try:
        value = json.loads(text)
    except ValueError:
        return text.strip().strip('"')
    return value if isinstance(value, str) else text


def overlap(text: str, marker: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `marker`."""
    return next((n for n in range(min(len(marker) - 1, len(text)), 0, -1) if text.endswith(marker[:n])), 0)
