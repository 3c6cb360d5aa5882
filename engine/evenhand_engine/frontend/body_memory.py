"""BodyMemory: how much memory a tenant's requests may take, from a body's first byte to the end of the answer.

A body is held until it is turned into token ids, these for as long as the request. Without a bound a tenant could fill the
memory with bodies that it never ends, or with requests that only queue.
"""

from collections import Counter
from typing import Protocol

from evenhand_engine.errors import Refusal


class Held(Protocol):
    """The part of its tenant's memory that one body takes, in whichever process that is counted."""

    def resize(self, size: int) -> None:
        """Count `size` bytes from now on: those that came instead of those that might, then those of the token ids."""
        ...

    def release(self) -> None:
        """Give all of it back; nothing follows."""
        ...


class HeldBody:
    """See `Held`."""

    def __init__(self, memory: "BodyMemory", tenant_id: str) -> None:
        self._memory = memory
        self._tenant_id = tenant_id
        self._size = 0

    def resize(self, size: int) -> None:
        self._memory.add(self._tenant_id, size - self._size)
        self._size = size

    def release(self) -> None:
        self.resize(0)


class BodyMemory:
    """Counts the bytes of each tenant's bodies.

    Args:
        max_bytes: of one tenant's bodies together.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes: Counter[str] = Counter()

    def num_bytes(self, tenant_id: str) -> int:
        return self._num_bytes[tenant_id]

    def add(self, tenant_id: str, num_bytes: int) -> None:
        self._num_bytes[tenant_id] += num_bytes
        if self._num_bytes[tenant_id] == 0:
            del self._num_bytes[tenant_id]

    def hold(self, tenant_id: str, size: int, retry_after: float) -> HeldBody:
        """Room for a body of up to `size` bytes; raises Refusal 429 while the tenant's others leave none.

        A tenant's only body always has room. `retry_after`: seconds until one of its requests ends, about.
        """
        held = self.num_bytes(tenant_id)
        if held and held + size > self._max_bytes:
            message = (
                f"The bodies of tenant {tenant_id} that are being answered take {held} of {self._max_bytes} bytes."
            )
            raise Refusal(429, "body_bytes", message, retry_after=retry_after)
        body = HeldBody(self, tenant_id)
        body.resize(size)
        return body
