"""What a proxied request is, by its body: sizes, and the few fields that a sidecar sets or takes away. Pure.

A body is decoded one level deep: values that are not ours stay the bytes that the client wrote. What is counted is read as the most
that any engine may make of it: some take "5" and 5.0 for 5, and of two limits each has its own that counts.
"""

import contextlib
import functools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from evenhand_engine.errors import Refusal
from evenhand_engine.scheduler.request import bounded_priority
from evenhand_engine.sidecar.members import decode_members, small_value
from evenhand_engine.sidecar.sampling import Sampling
from evenhand_engine.sidecar.skeleton import Skeleton

_DEFAULT_BYTES_PER_TOKEN = 4.0
_SMOOTHING_UP = 0.1
_SMOOTHING_DOWN = 0.5  # who was sparse for long is soon taken for dense: else long prompts pass for short
_MAX_RATIO = 8.0  # of text, spaces and names of members included
_MIN_RATIO = 0.5
_MEDIA = re.compile(rb'"(?:url|image_url|file_data|data)"\s*:\s*"(?:data:[^",]{1,100},)?([A-Za-z0-9+/=\\]{256,})')
_MEDIA_WEIGHT = 1 / 16  # of a byte of a picture, beside one of text
_TRUE = {"true", "1", "1.0", "on", "t", "y", "yes"}  # as lenient engines read it
_TOKEN_IDS = re.compile(rb"\[\s*(?:\[\s*)?\d")
_PROMPTS = ("prompt", "prompt_embeds", "input_ids", "text", "token_ids", "instances")
_JSON_BEGINS = (b"{", b"\xef\xbb\xbf{")  # some engines look at no Content-Type, and some leave out a byte order mark
MAX_CHOICES = 256  # of all prompts of one body, as in the engine


class BytesPerToken:
    """How many bytes of a body are one token: learned of each tenant by the usage of its own requests, so that nobody's
    text changes what another is charged."""

    def __init__(self) -> None:
        self._ratios: dict[str, float] = {}

    def estimate(self, tenant_id: str, num_bytes: int) -> int:
        """Tokens of a prompt in a body of that size; at least 1."""
        return max(1, int(num_bytes / self._ratios.get(tenant_id, _DEFAULT_BYTES_PER_TOKEN)))

    def learn(self, tenant_id: str, num_bytes: int, num_tokens: int) -> None:
        """A body of `num_bytes` had a prompt of `num_tokens`."""
        if num_tokens > 0:
            ratio = min(max(num_bytes / num_tokens, _MIN_RATIO), _MAX_RATIO)
            last = self._ratios.get(tenant_id, _DEFAULT_BYTES_PER_TOKEN)
            smoothing = _SMOOTHING_UP if ratio > last else _SMOOTHING_DOWN
            self._ratios[tenant_id] = last + smoothing * (ratio - last)


@contextlib.contextmanager
def refusing_what_is_no_json() -> Iterator[None]:
    """What msgspec says of it as Refusal 400."""
    try:
        yield
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refusal(400, "invalid_json", f"The body is not JSON in UTF-8: {error}.") from error


def is_json_object(start: bytes) -> bool:
    """Whether a body that begins so may be taken for a JSON object by somebody, whatever its Content-Type says."""
    return start.lstrip().startswith(_JSON_BEGINS) or not start.strip()


class Body:
    """A JSON object that a client sent, or anything else, which is passed on as it is.

    Attributes:
        num_bytes: as many as came.
        fields: values of the object's members as JSON text; None: it is no JSON object.
    """

    def __init__(
        self,
        raw: bytes,
        *,
        is_json: bool = True,
        skeleton: Skeleton | None = None,
        pieces: Sequence[bytes] | None = None,
    ) -> None:
        """`raw`: as it came, or where it is large its skeleton, or nothing of what is no JSON; `pieces`, if that is not what came: what
        did. `is_json`: as it says of itself, or as it looks. Raises Refusal 400 if it is none and is not empty: what one parser
        takes and another does not would pass unseen."""
        self._raw = raw
        self._skeleton = skeleton
        self._pieces = (raw,) if pieces is None else pieces
        self.num_bytes = sum(map(len, self._pieces))
        self.fields: dict[str, msgspec.Raw] | None = None
        self._is_changed = False
        start = raw.lstrip()[:1] if is_json else b""
        with refusing_what_is_no_json():
            if start == b"{":
                self.fields = decode_members(raw)
            elif start:
                msgspec.json.decode(raw, type=msgspec.Raw)

    def learn(self) -> None:
        """Look at all that grows with its size, so that it is known afterwards."""
        for name in ("size", "num_prompts", "num_token_ids", "num_choices"):
            getattr(self, name)

    def value(self, name: str) -> Any:
        """A member's value; None where there is none, or none that can be read, or one too large to be of use."""
        raw = None if self.fields is None else self.fields.get(name)
        if raw is None or (self._skeleton is not None and self._skeleton.has_mark(bytes(raw))):
            return None
        return small_value(raw)

    def set(self, name: str, value: Any) -> None:
        """Set a member, or with None take it away; an object is needed."""
        assert self.fields is not None
        if value is None:
            self._is_changed |= self.fields.pop(name, None) is not None
        else:
            self.fields[name] = msgspec.Raw(msgspec.json.encode(value))
            self._is_changed = True

    def encode(self) -> Sequence[bytes]:
        """What goes to the upstream, in pieces: the very bytes that came, unless a member was changed."""
        return self.expand(msgspec.json.encode(self.fields)) if self._is_changed else self._pieces

    def expand(self, text: bytes) -> Sequence[bytes]:
        """JSON that was made of the body's values, with what a skeleton leaves out, in pieces."""
        return (text,) if self._skeleton is None else self._skeleton.expand(text)

    @functools.cached_property
    def size(self) -> int:
        """Its bytes, as far as they may be text: pictures and sounds count little."""
        size = len if self._skeleton is None else self._skeleton.size
        num_media_bytes = sum(size(match[1]) for match in _MEDIA.finditer(self._raw))
        return self.num_bytes - int((1 - _MEDIA_WEIGHT) * num_media_bytes)

    @property
    def is_stream(self) -> bool:
        return is_true(self.value("stream"))

    @property
    def user(self) -> str:
        """OpenAI's, or Anthropic's name for the same."""
        user, metadata = self.value("user"), self.value("metadata")
        if user is None and isinstance(metadata, dict):
            user = metadata.get("user_id")
        return user[:512] if isinstance(user, str) else ""

    @property
    def priority(self) -> int:
        return bounded_priority(self.value("priority"))

    @functools.cached_property
    def _sampling(self) -> Sampling:
        return Sampling({} if self.fields is None else self.fields)

    @functools.cached_property
    def num_choices(self) -> int:
        """How many answers it asks for, over all its prompts. Raises Refusal 400 where that cannot be looked at."""
        return self.num_prompts * self._sampling.num_choices

    @functools.cached_property
    def num_prompts(self) -> int:
        return max(map(_num_prompts, self._prompts()), default=1)

    def max_output_tokens(self, path: str) -> int | None:
        """The limit of one choice; None: there is none that holds at this path. See `Sampling`."""
        return self._sampling.max_output_tokens(path)

    def limit_outputs(self, path: str, limit: int) -> None:
        """Have no choice of more tokens, as far as engines at this path are known."""
        self._sampling.bound(path, limit)
        self._is_changed = True

    def _prompts(self) -> list[bytes]:
        fields = self.fields or {}
        return [raw for name in _PROMPTS if name in fields and (raw := bytes(fields[name])) != b"null"]

    @functools.cached_property
    def num_token_ids(self) -> int | None:
        """How many token ids its prompts have; None where there is text."""
        raws = self._prompts()
        if not raws or any(b'"' in raw or not _TOKEN_IDS.match(raw) for raw in raws):
            return None
        return sum(raw.count(b",") + 1 for raw in raws)

    def prompt_fields(self) -> dict[str, Any]:
        """What makes the prompt, for a tokenizer; of a large body not whole, but for `expand`."""
        names = ("model", "prompt", "messages", "tools", "add_special_tokens", "chat_template_kwargs")
        return {name: self.fields[name] for name in names if self.fields and name in self.fields}


def is_true(value: Any) -> bool:
    """Whether a lenient engine takes the value for true."""
    return str(value).lower() in _TRUE if isinstance(value, bool | int | float | str) else False


def _num_prompts(raw: bytes) -> int:
    """Of a prompt as JSON: a text or a list of token ids is one, else each text and each list in it."""
    first = raw[1:].lstrip()[:1]
    if first == b"{" and raw.startswith(b"["):  # Vertex's instances
        return raw.count(b"{")
    if first not in (b'"', b"[") or not raw.startswith(b"["):
        return 1
    bare = raw.replace(rb"\\", b"").replace(rb"\"", b"")  # so that each quote left begins or ends a text
    num_texts = bare.count(b'"') // 2
    if num_texts > MAX_CHOICES:
        return num_texts
    return max(1, num_texts + sum(part.count(b"[") for part in bare.split(b'"')[::2]) - 1)
