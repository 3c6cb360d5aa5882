"""EventReader: what a sidecar reads of an event stream that passes through it. Pure, and without parsing what need not be.

The stream goes on byte for byte, cut where an event ends, so that one may be left out: the usage that we asked for and the
client did not. An event is one token unless the usage says otherwise at the end.
"""

import re

import msgspec

_BOUNDARY = re.compile(rb"\n\r?\n|\r\r")  # a line may end in \n, \r\n or \r
_DATA = re.compile(rb"(?:^|[\r\n])data:")
_LINES = re.compile(rb"(?:^|[\r\n])data:([^\r\n]*)")
_END = re.compile(rb'\s*(?:\[DONE\]|\{\s*"error"\s*:(?!\s*null))')  # of the answer: what its last data begin with
_NO_CHOICES = re.compile(rb'"choices"\s*:\s*\[\s*\]')
_USAGE = re.compile(rb'"usage"\s*:\s*\{')  # no text can hold it: its quotes are escaped
_PLAIN = re.compile(
    rb'(?:(?:event: [^\n]*+\n)?data: \{"(?!error")[^\n]*+\n\n)+'
)  # whole events, where no line ends in \r
_CR, _LF, _E = b"\r\ne"  # an error begins with the last one
_MAX_USUAL_BYTES = 4096
_MAX_HELD_BYTES = 64 * 1024  # of an event that has not ended; a usage is shorter


def _usual_beginnings() -> list[bytes]:
    """By the length of all of it, how an event begins that has a chunk to itself."""
    beginnings = [b"\n"] * _MAX_USUAL_BYTES  # none begins so
    for size in range(_MAX_USUAL_BYTES - 16):
        line = b"%x\r\n" % size
        beginnings[len(line) + size + 2] = line + b'data: {"'
    return beginnings


_USUAL_BEGINNINGS = _usual_beginnings()


class PromptDetails(msgspec.Struct, frozen=True):
    cached_tokens: int | None = None


class Usage(msgspec.Struct, frozen=True):
    """OpenAI's, and Anthropic's names for the same."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    prompt_tokens_details: PromptDetails | None = None

    @property
    def num_prompt_tokens(self) -> int | None:
        return self.prompt_tokens if self.prompt_tokens is not None else self.input_tokens

    @property
    def num_output_tokens(self) -> int | None:
        return self.completion_tokens if self.completion_tokens is not None else self.output_tokens

    @property
    def num_cached_tokens(self) -> int:
        return (self.prompt_tokens_details and self.prompt_tokens_details.cached_tokens) or 0

    def is_plausible(self, num_prompt_tokens: int, num_output_tokens: int) -> bool:
        """Whether no count is negative or beyond these."""
        prompt, output = self.num_prompt_tokens or 0, self.num_output_tokens or 0
        return 0 <= self.num_cached_tokens <= prompt <= num_prompt_tokens and 0 <= output <= num_output_tokens


class _Timings(msgspec.Struct, frozen=True):
    cache_n: int | None = None


class _Inner(msgspec.Struct, frozen=True):
    usage: Usage | None = None


class _WithUsage(msgspec.Struct, frozen=True):
    """OpenAI's completions and responses, Anthropic's messages, SGLang's own `/generate` and llama.cpp's `/completion`."""

    usage: Usage | None = None
    meta_info: Usage | None = None
    response: _Inner | None = None
    message: _Inner | None = None
    tokens_evaluated: int | None = None
    tokens_predicted: int | None = None
    timings: _Timings | None = None


def usage_of(body: bytes) -> Usage | None:
    """The usage in a JSON answer or event; None where there is none that can be read."""
    try:
        found = msgspec.json.decode(body, type=_WithUsage)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    if found.usage is not None or found.meta_info is not None:
        return found.usage or found.meta_info
    inner = found.response or found.message
    if inner is not None:
        return inner.usage
    if found.tokens_evaluated is None:
        return None
    cached = PromptDetails(found.timings.cache_n if found.timings else None)
    return Usage(found.tokens_evaluated, found.tokens_predicted, prompt_tokens_details=cached)


class EventReader:
    """Reads one event stream.

    Args:
        hides_usage: leave the event out that holds nothing but usage.

    Attributes:
        num_events: data events that came, but for the end and for one that holds nothing but usage.
        is_done: `[DONE]` came, or an error in its place.
    """

    __slots__ = (
        "_first_usage",
        "_held",
        "_hides_usage",
        "_last",
        "_last_usage",
        "_passes_rest",
        "is_done",
        "num_events",
    )

    def __init__(self, *, hides_usage: bool) -> None:
        self.num_events = 0
        self.is_done = False
        self._hides_usage = hides_usage
        self._held = b""
        self._passes_rest = False  # the event that goes on is too long to be held, and is known not to be hidden
        self._first_usage = self._last_usage = b""  # events that have one
        self._last = b""  # the last event but for those that have nothing else to say

    @property
    def usage(self) -> Usage | None:
        """What the last event that had a usage says; prompts by the first one where only that knows them."""
        last = _usage_of_event(self._last_usage or self._last)  # llama.cpp's own has it in each, under no such name
        if last is None or last.num_prompt_tokens is not None:
            return last
        first = _usage_of_event(self._first_usage)
        return last if first is None else msgspec.structs.replace(last, input_tokens=first.num_prompt_tokens)

    def passes(self, data: bytes) -> bool:
        """Take in what came, framing of chunks included, if it is one event in one chunk, as nearly always, and goes on just so.
        Returns whether it is; it begins where a chunk may begin."""
        num_bytes = len(data)
        if self._held or num_bytes >= _MAX_USUAL_BYTES:
            return False
        beginning = _USUAL_BEGINNINGS[num_bytes]
        start = len(beginning)
        if (
            not data.startswith(beginning)
            or data[start] == _E
            or data.find(_LF, start) != num_bytes - 4
            or data.find(_CR, start) != num_bytes - 2
            or data[-4:] != b"\n\n\r\n"
            or _USAGE.search(data)
        ):
            return False
        self.num_events += 1
        self._last = data
        return True

    def feed(self, chunk: bytes) -> bytes:
        """Take in what came; returns what goes to the client now."""
        is_plain = not self._held and b"\r" not in chunk and _PLAIN.fullmatch(chunk) and not _USAGE.search(chunk)
        if is_plain:  # as nearly always
            num_events = chunk.count(b"\n\n")
            self.num_events += num_events
            self._last = chunk if num_events == 1 else chunk[chunk.rfind(b"\n\n", 0, -2) + 2 :]
            return chunk
        data = self._held + chunk if self._held else chunk
        start, out = 0, []
        for match in _BOUNDARY.finditer(data, max(0, len(self._held) - 3)):
            end = match.end()
            if self._passes_rest:
                self._passes_rest = False
                self.num_events += 1
                out.append(data[start:end])
            elif self._keeps(data[start:end]):
                out.append(data[start:end])
            start = end
        self._held = data[start:]
        if self._passes_rest or len(self._held) > _MAX_HELD_BYTES:
            self._passes_rest = True
            out.append(self._held[:-3])  # three bytes may be the beginning of a boundary
            self._held = self._held[-3:]
        return out[0] if len(out) == 1 else b"".join(out)

    def flush(self) -> bytes:
        """The last event, if nothing ended it."""
        held, self._held = self._held, b""
        if held.strip() and not self._passes_rest and not self._keeps(held):
            return b""
        return held

    def _keeps(self, event: bytes) -> bool:
        data = _DATA.search(event)
        if data is None:
            return True  # a comment
        if _END.match(event, data.end()):
            self.is_done = True
            return True
        if b'"usage"' in event and _USAGE.search(event):
            self._first_usage, self._last_usage = self._first_usage or event, event
            if _NO_CHOICES.search(event):
                return not self._hides_usage
        self.num_events += 1
        self._last = event
        return True


def _usage_of_event(event: bytes) -> Usage | None:
    """`usage_of` its lines of data, which are one text."""
    return usage_of(b"\n".join(_LINES.findall(event))) if event else None
