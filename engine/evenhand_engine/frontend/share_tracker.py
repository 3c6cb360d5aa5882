"""ShareTracker: who got how much of the engine lately, beside what they were entitled to. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field

_HALF_LIFE_SECONDS = 30.0


@dataclass(slots=True)
class _Account:
    service: int = 0  # total at the last look
    attained: float = 0.0
    entitled: float = 0.0


@dataclass(frozen=True, slots=True)
class Share:
    """Fractions of all recent service: what a tenant got, and what its weight gave it while it had work."""

    attained: float
    entitled: float


@dataclass(slots=True)
class ShareTracker:
    """Follows the tenants' service counters with a half-life of 30 seconds.

    In each interval the service of all is divided in proportion to the weights of those that had work in it. A tenant
    below its entitlement had less work than it was entitled to, unless it kept requests waiting.
    """

    _accounts: dict[str, _Account] = field(default_factory=dict)
    _time: float | None = None

    def observe(self, services: Mapping[str, int], weights: Mapping[str, int], now: float) -> None:
        """Take in the service counters of all tenants at `now`; `weights` holds those that had work since the last."""
        decay = 1.0 if self._time is None else 0.5 ** ((now - self._time) / _HALF_LIFE_SECONDS)
        self._time = now
        total_service = 0
        for tenant_id, service in services.items():
            account = self._accounts.setdefault(tenant_id, _Account())
            gained = max(0, service - account.service)  # less after a refund, or of a tenant that was deleted
            account.service = service
            account.attained = account.attained * decay + gained
            account.entitled *= decay
            total_service += gained
        total_weight = sum(weights.values())
        for tenant_id, weight in weights.items():
            self._accounts.setdefault(tenant_id, _Account()).entitled += total_service * weight / total_weight

    def forget(self, tenant_id: str) -> None:
        """The tenant is gone: what it got lately is no part of what the others share."""
        self._accounts.pop(tenant_id, None)

    def shares(self) -> dict[str, Share]:
        """By tenant id; empty while nothing was served."""
        total = sum(account.attained for account in self._accounts.values())
        if total <= 0:
            return {}
        return {t: Share(account.attained / total, account.entitled / total) for t, account in self._accounts.items()}
