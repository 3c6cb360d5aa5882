"""Messages between an API server and the owner of quotas: msgspec structs, sent as MessagePack over a `Channel`.

A Call is answered by Answer or Refused with its id; all others are told and not answered. Each side reads in the order in which
the other wrote. Claims and held bodies are named by their API server, which counts them.
"""

import msgspec

from evenhand_engine.errors import Refusal
from evenhand_engine.frontend.claims import Demand
from evenhand_policy.config import SchedulerConfig


class Call(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What waits for an answer."""

    call_id: int


class Enter(Call, frozen=True, kw_only=True, tag=True):
    """See `Door.enter`. Room for a body, which is `body` from now on; answered with the number of requests taken."""

    tenant_id: str
    body: int
    num_bytes: int
    generates: bool


class Reserve(Call, frozen=True, kw_only=True, tag=True):
    """Claims `first_claim` and following, one for each choice. Answered with the output limit of each."""

    tenant_id: str
    demand: Demand
    first_claim: int


class AskRateLimits(Call, frozen=True, kw_only=True, tag=True):
    """Answered with a list of RateLimit."""

    tenant_id: str


class AskQueueDelay(Call, frozen=True, kw_only=True, tag=True):
    """Answered with seconds."""

    tenant_id: str


class AskHealth(Call, frozen=True, kw_only=True, tag=True):
    """Answered with what is wrong, or null."""


class AskMetrics(Call, frozen=True, kw_only=True, tag=True):
    """Answered with the text of the public port."""


class AskLoad(Call, frozen=True, kw_only=True, tag=True):
    """Answered with the number of requests in flight."""


class Resize(msgspec.Struct, frozen=True, tag=True):
    """A held body takes so many bytes from now on."""

    body: int
    num_bytes: int


class Release(msgspec.Struct, frozen=True, tag=True):
    """A held body is given back."""

    body: int


class Progress(msgspec.Struct, frozen=True, tag=True):
    """What one step brought. Of each claim: that it started, with how many cached tokens; how many outputs came."""

    now: float
    started: list[tuple[int, int]]
    generated: list[tuple[int, int]]


class Ended(msgspec.Struct, frozen=True, tag=True):
    """A claim has ended; see `Claim.ended`."""

    claim: int
    outcome: str
    reason: str
    num_output_tokens: int
    num_preemptions: int
    now: float


class RefusalCounted(msgspec.Struct, frozen=True, tag=True):
    tenant_id: str
    code: str


class ClientStalled(msgspec.Struct, frozen=True, tag=True):
    tenant_id: str


class Enforces(msgspec.Struct, frozen=True, tag=True):
    """The last config that came is in force here."""

    number: int


class Serving(msgspec.Struct, frozen=True, tag=True):
    """The public port is served."""


class Idle(msgspec.Struct, frozen=True, tag=True):
    """Of one that drains: nothing is answered any more."""


class StartFailed(msgspec.Struct, frozen=True, tag=True):
    """It cannot be; `message` is what the user should read."""

    message: str


class Answer(msgspec.Struct, frozen=True, tag=True):
    """The result of a call, as its kind says."""

    call_id: int
    result: msgspec.Raw


class ToldRefusal(msgspec.Struct, frozen=True):
    """A Refusal on its way; the fields are its own."""

    status: int
    code: str
    message: str
    param: str | None
    retry_after: float | None

    @classmethod
    def of(cls, refusal: Refusal) -> "ToldRefusal":
        return cls(refusal.status, refusal.code, refusal.message, refusal.param, refusal.retry_after)

    def refusal(self) -> Refusal:
        return Refusal(self.status, self.code, self.message, param=self.param, retry_after=self.retry_after)


class Refused(msgspec.Struct, frozen=True, tag=True):
    """A call was refused."""

    call_id: int
    why: ToldRefusal


class Enforce(msgspec.Struct, frozen=True, tag=True):
    """The config from now on. `number` counts them."""

    number: int
    config: SchedulerConfig
    is_configured: bool


class Drain(msgspec.Struct, frozen=True, tag=True):
    """Refuse what is new, and say when nothing is answered any more. The end comes with that of the channel."""


class Cut(msgspec.Struct, frozen=True, tag=True):
    """Of one that drains: the time is over, and what still runs must end."""


class Exhausted(msgspec.Struct, frozen=True, tag=True):
    """The quota leaves no more for a claim, which must end."""

    claim: int


AnyCall = Enter | Reserve | AskRateLimits | AskQueueDelay | AskHealth | AskMetrics | AskLoad
ToOwner = (
    AnyCall
    | Resize
    | Release
    | Progress
    | Ended
    | RefusalCounted
    | ClientStalled
    | Enforces
    | Serving
    | Idle
    | StartFailed
)
ToApiServer = Answer | Refused | Enforce | Drain | Cut | Exhausted
