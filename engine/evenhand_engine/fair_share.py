"""FairShare: accounts of weighted service, and the virtual time that keeps anybody from banking credit.

Used at two levels with the same rules: tenants of the engine, and users of one tenant. The only writer of virtual
service. It decides nothing: the scheduler charges, tells who was left out, and asks who is behind.

The rule stands on start-time fair queueing (Goyal, Vin, Cheng, SIGCOMM 1996) and the virtual token counter (Sheng et
al., OSDI 2024), with the lift applied at every step rather than on arrival only: a step that leaves somebody out sets
the virtual time to the least virtual service of those; a step that leaves nobody out settles all accounts. No account
is ever worth less than the virtual time, so silence earns nothing, and using what nobody wanted costs nothing.
"""

from collections.abc import Iterable

VIRTUAL_UNIT = 1 << 20
"""Virtual service is an integer: cost * VIRTUAL_UNIT / weight, so a charge is rounded by less than a millionth."""

_PRUNE_AT = 4096


class FairShare:
    """Virtual service of each account, all at least `virtual_time`. An account that was never charged is at it."""

    def __init__(self) -> None:
        self.virtual_time = 0
        self._virtual_service: dict[str, int] = {}
        self._highest = 0

    def virtual_service(self, account: str) -> int:
        """What the account was served, by weight, in VIRTUAL_UNITs; never less than `virtual_time`."""
        return max(self._virtual_service.get(account, 0), self.virtual_time)

    def charge(self, account: str, cost: int, weight: int) -> None:
        """Add `cost` (negative: a refund) of an account whose share is `weight`."""
        units = abs(cost) * VIRTUAL_UNIT // weight
        service = self.virtual_service(account) + (units if cost >= 0 else -units)
        self._virtual_service[account] = service
        self._highest = max(self._highest, service)

    def close_step(self, left_out: Iterable[str]) -> None:
        """Advance the virtual time after a step; `left_out`: accounts with work that the step had no room for."""
        least = None
        for account in left_out:
            service = self._virtual_service.get(account, 0)
            if service <= self.virtual_time:
                return
            if least is None or service < least:
                least = service
        if least is None:
            self.virtual_time = self._highest
            self._virtual_service.clear()
            return
        self.virtual_time = least
        if len(self._virtual_service) > _PRUNE_AT:
            self._virtual_service = {a: s for a, s in self._virtual_service.items() if s > self.virtual_time}
