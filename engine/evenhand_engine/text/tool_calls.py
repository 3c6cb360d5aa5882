"""Tool calls in an output's text: what is content, and what is a call of a function with its arguments, as the text comes.

Models write calls in formats of their own; each is data here (`ToolFormat`). Pure: fed with pieces of text, of any size.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from evenhand_engine.text.tool_call_objects import Arguments, Call, CallStart, Content, Event, NamedCall, ObjectCall


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a model writes calls. Each is a JSON object with a name and arguments, or a name and the object of its arguments.

    Attributes:
        name: as `--tool-call-parser` has it.
        markers: what calls begin with, the one to write first. Empty: calls are the output from its beginning, or none are.
        end: what follows one call; shown to nobody.
        arguments: the member that holds the arguments.
        begin, between, close: what is written before the first call, between two and after the last.
        name_mark: what stands between a name and its arguments, where calls may be these two; else empty.
        writes_names: calls are to be written so; read they are in either way.
        id_length: letters and digits of a call's id, where templates insist on a number; None: any.
    """

    name: str
    markers: tuple[str, ...]
    end: str = ""
    arguments: str = "arguments"
    begin: str = ""
    between: str = ""
    close: str = ""
    name_mark: str = ""
    writes_names: bool = False
    id_length: int | None = None


_MISTRAL = ToolFormat(
    "mistral", ("[TOOL_CALLS]",), begin=" [", between=", ", close="]", name_mark="[ARGS]", id_length=9
)
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
        _MISTRAL,
        replace(_MISTRAL, name="mistral_args", begin="", between="[TOOL_CALLS]", close="", writes_names=True),
        ToolFormat("granite", ("<|tool_call|>", "<tool_call>"), begin="[", between=", ", close="]"),
    )
}


def detect_format(template: str) -> ToolFormat | None:
    """The format that a chat template teaches; None if it takes no tools or none that is known."""
    if "tools" not in template:
        return None
    for name, sign in (
        ("mistral_args", "[ARGS]"),
        ("mistral", "[TOOL_CALLS]"),
        ("granite", "<|tool_call|>"),
        ("hermes", "<tool_call>"),
        ("llama3_json", '"parameters":'),
    ):
        if sign in template:
            return FORMATS[name]
    return None


_SEPARATORS = " \t\r\n],;"


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
        self._call: Call | None = None
        self._is_inside = False  # between the marker of calls and what is none of them
        self._may_be_name = False  # that follows the marker
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

    def _read_call(self, call: Call) -> Iterator[Event]:
        events, num_taken = call.push(self._text)
        self._text = self._text[num_taken:]
        for event in events:
            self.num_calls += isinstance(event, CallStart)
            yield event
        if call.is_complete:
            yield from self._end_call(call, is_whole=True)

    def _end_call(self, call: Call, *, is_whole: bool) -> Iterator[Event]:
        """What never said its name is content."""
        self._call, self._may_be_name = None, False
        if call.name is None:
            self._is_inside = isinstance(call, ObjectCall)
            yield Content(call.text)
        elif is_whole and not call.has_arguments:
            yield Arguments("{}")

    def _read_between(self, *, is_last: bool) -> Iterator[Event]:
        """White space, brackets, separators, markers and ends before the next call; anything else is content again."""
        self._text = text = self._text.lstrip(_SEPARATORS)
        marks = [mark for mark in (self._form.end, *self._form.markers) if mark]
        if seen := [mark for mark in marks if text.startswith(mark)]:
            self._pass(max(seen))
        elif not text or (not is_last and any(mark.startswith(text) for mark in marks)):
            return
        elif text.startswith("["):
            self._text, self._may_be_name = text[1:], False
        elif text.startswith("{"):
            self._call = ObjectCall(self._form.arguments)
            yield from self._read_call(self._call)
        elif self._may_be_name:
            self._call = NamedCall()
            yield from self._read_call(self._call)
        else:
            self._is_inside = False
            yield from self._read_content(is_last=is_last)

    def _pass(self, mark: str) -> None:
        self._text = self._text[len(mark) :]
        self._may_be_name = bool(self._form.name_mark) and mark in self._form.markers

    def _read_content(self, *, is_last: bool) -> Iterator[Event]:
        markers = self._form.markers
        if not markers:
            yield from self._read_bare(is_last=is_last)
            return
        found = [(at, marker) for marker in markers if (at := self._text.find(marker)) >= 0]
        if found:
            at, marker = min(found)
            yield from self._content(self._text[:at])
            self._text, self._is_inside, self._blank = self._text[at:], True, ""
            self._pass(marker)
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


def overlap(text: str, marker: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `marker`."""
    return next((n for n in range(min(len(marker) - 1, len(text)), 0, -1) if text.endswith(marker[:n])), 0)
