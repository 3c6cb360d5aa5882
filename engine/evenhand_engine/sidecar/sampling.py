"""Where a body says how to sample: among its members, and in objects of their own that some engines read instead. Pure.

    {"prompt": ..., "n": 2, "max_tokens": 7}                                 OpenAI's, Anthropic's, llama.cpp's
    {"text": ..., "sampling_params": {"n": 2, "max_new_tokens": 7}}          SGLang's /generate; a list: one for each prompt
    {"instances": ..., "parameters": {...}}, {"messages": ..., "options": {...}}     Vertex's and TGI's, Ollama's

What is counted is the most of all. What is bounded is every limit that is named, and the one that the path's engines go by.
"""

import msgspec

from evenhand_engine.errors import Refusal
from evenhand_engine.sidecar.members import Members, decode_members, is_named, small_value

_OBJECTS = ("sampling_params", "parameters", "options")
_LIMITS = ("max_completion_tokens", "max_tokens", "max_output_tokens", "max_new_tokens", "n_predict", "num_predict")
_CHOICES = ("n", "best_of", "n_cmpl")
_CHAT = ("", "max_tokens", "max_completion_tokens")
_OWN_LIMITS: dict[str, tuple[tuple[str, ...], ...]] = {  # what counts at a path: in which object, and its names
    **dict.fromkeys(("/v1/completions", "/v1/messages"), (("", "max_tokens"),)),
    **dict.fromkeys(("/v1/chat/completions", "/chat/completions", "/invocations"), (_CHAT,)),
    **dict.fromkeys(("/completion", "/completions", "/infill"), (("", "n_predict"),)),
    "/v1/responses": (("", "max_output_tokens"),),
    "/api/chat": (_CHAT, ("options", "num_predict")),  # llama.cpp's and SGLang's
    "/api/generate": (("options", "num_predict"),),
    "/generate": (("sampling_params", "max_new_tokens"),),
    "/inference/v1/generate": (("sampling_params", "max_tokens"),),
    "/vertex_generate": (("parameters", "max_new_tokens"),),
}
_MAX_LIST_BYTES = 64 * 1024


class Sampling:
    """What one body says of choices and limits, where its members are given.

    Raises Refusal 400 if it says more than can be looked at.
    """

    def __init__(self, members: Members) -> None:
        self._members = members
        self._objects = {name: _read(name, members[name]) for name in _OBJECTS if name in members}

    @property
    def num_choices(self) -> int:
        """Answers to each prompt; at least 1."""
        return max(count(raw) or 1 for raw in (msgspec.Raw(b"1"), *self._named(_CHOICES)))

    def max_output_tokens(self, path: str) -> int | None:
        """The largest limit of a choice; None: it names none, or one that is no number above 0, or not the one that counts at
        this path: what one engine takes for a limit, another may not know."""
        limits = [count(raw) for raw in self._named(_LIMITS)]
        return None if None in limits or self._missing(path) else max(filter(None, limits), default=None)

    def bound(self, path: str, limit: int) -> None:
        """Let no limit above `limit` go on, and none that is no number, and name the one that counts at this path."""
        value = msgspec.Raw(msgspec.json.encode(limit))
        for level in self._levels():
            level |= {
                name: value for name in _LIMITS if is_named(level, name) and (count(level[name]) or limit + 1) > limit
            }
        for of, name in self._missing(path):
            if of and not self._objects.get(of):
                self._objects[of] = [{}]
            for level in self._objects[of] if of else [self._members]:
                level |= {} if is_named(level, name) else {name: value}
        for of, listed in self._objects.items():
            if listed:
                is_list = bytes(self._members.get(of, b"")).startswith(b"[")
                self._members[of] = msgspec.Raw(msgspec.json.encode(listed if is_list else listed[0]))

    def _missing(self, path: str) -> list[tuple[str, str]]:
        """The limits that count at this path and are not named: in which object, empty for the body itself, and as what."""
        return [
            (of, names[0])
            for of, *names in _OWN_LIMITS.get(path, ())
            if not (levels := self._objects.get(of, []) if of else [self._members])
            or not all(any(is_named(level, name) for name in names) for level in levels)
        ]

    def _levels(self) -> list[Members]:
        return [self._members, *(members for listed in self._objects.values() for members in listed)]

    def _named(self, names: tuple[str, ...]) -> list[msgspec.Raw]:
        return [level[name] for level in self._levels() for name in names if is_named(level, name)]


def count(raw: msgspec.Raw) -> int | None:
    """A number above 0 as lenient engines read it, "5" and 5.0 too; None: it is none."""
    value = small_value(raw)
    try:
        number = float(value) if isinstance(value, str | int | float) else 0.0
    except (ValueError, OverflowError):
        return None
    return int(number) if 0 < number < 2**31 and number == int(number) else None


def _read(name: str, raw: msgspec.Raw) -> list[Members]:
    """The object, or those of the list; none where it is anything else, which no engine reads."""
    text = bytes(raw)
    try:
        if text.startswith(b"{"):
            return [decode_members(raw)]
        if text.startswith(b"["):
            if len(text) > _MAX_LIST_BYTES:
                message = f"A list as `{name}` has at most {_MAX_LIST_BYTES} bytes; give one object for all prompts."
                raise Refusal(400, "invalid_value", message, param=name)
            return msgspec.json.decode(raw, type=list[Members])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    return []
