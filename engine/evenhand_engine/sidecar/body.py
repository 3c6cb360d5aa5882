"""What a proxied request is, by its body: sizes, and the few fields that a sidecar sets or takes away. Pure.

A body is decoded one level deep: values that are not ours stay the bytes that the client wrote.
"""

import re
from typing import Any

import msgspec

from evenhand_engine.scheduler.request import bounded_priority

_DEFAULT_BYTES_PER_TOKEN = 4.0
_SMOOTHING = 0.1
_MAX_RATIO = 64.0
_MIN_RATIO = 0.5
_TOKEN_IDS = re.compile(rb"\[\s*(?:\[\s*)?\d")
_OUTPUT_FIELDS = ("max_completion_tokens", "max_tokens", "max_output_tokens", "max_new_tokens", "n_predict")
_MAX_CHOICES = 1024
_MAX_VALUE_BYTES = 4096  # two of which may become an object of sixty


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
            self._ratios[tenant_id] = last + _SMOOTHING * (ratio - last)


class Body:
    """A JSON object that a client sent, or anything else, which is passed on as it is.

    Attributes:
        raw: as it came.
        fields: values of the object's members as JSON text; None: it is no JSON object.
    """

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        self.fields: dict[str, msgspec.Raw] | None
        try:
            self.fields = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            self.fields = None
        self._is_changed = False

    def value(self, name: str) -> Any:
        """A member's value; None where there is none, or none that can be read, or one too large to be of use."""
        raw = None if self.fields is None else self.fields.get(name)
        if raw is None or len(bytes(raw)) > _MAX_VALUE_BYTES:
            return None
        try:
            return msgspec.json.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None

    def set(self, name: str, value: Any) -> None:
        """Set a member, or with None take it away; an object is needed."""
        assert self.fields is not None
        if value is None:
            self._is_changed |= self.fields.pop(name, None) is not None
        else:
            self.fields[name] = msgspec.Raw(msgspec.json.encode(value))
            self._is_changed = True

    def encode(self) -> bytes:
        """What goes to the upstream: the very bytes that came, unless a member was changed."""
        return msgspec.json.encode(self.fields) if self._is_changed else self.raw

    @property
    def is_stream(self) -> bool:
        return self.value("stream") is True

    @property
    def user(self) -> str:
        user = self.value("user")
        return user[:512] if isinstance(user, str) else ""

    @property
    def priority(self) -> int:
        return bounded_priority(self.value("priority"))

    @property
    def num_choices(self) -> int:
        n = self.value("n")
        return min(n, _MAX_CHOICES) if isinstance(n, int) and not isinstance(n, bool) and n > 0 else 1

    @property
    def max_output_tokens(self) -> int | None:
        """The limit that it names, of one choice."""
        values = (self.value(name) for name in _OUTPUT_FIELDS if self.fields and name in self.fields)
        return next((v for v in values if isinstance(v, int) and not isinstance(v, bool) and 0 < v < 2**31), None)

    @property
    def num_token_ids(self) -> int | None:
        """How many token ids its prompt has; None where that is text."""
        raw = None if self.fields is None else self.fields.get("prompt") or self.fields.get("input_ids")
        if raw is None or not _TOKEN_IDS.match(bytes(raw)):
            return None
        return bytes(raw).count(b",") + 1

    def prompt_fields(self) -> dict[str, Any]:
        """What makes the prompt, for a tokenizer."""
        names = ("model", "prompt", "messages", "tools", "add_special_tokens", "chat_template_kwargs")
        return {name: self.fields[name] for name in names if self.fields and name in self.fields}
