"""FairShare: accounts of weighted service in their order, and the virtual time that keeps anybody from banking credit.

Used at two levels with the same rules: tenants of the engine, and users of one tenant. The only writer of virtual
service. It decides nothing: the scheduler charges, tells who was left out, and asks who is behind.

The rule stands on start-time fair queueing (Goyal, Vin, Cheng, SIGCOMM 1996) and the virtual token counter (Sheng et
al., OSDI 2024), with the lift applied at every step rather than on arrival only: a step that leaves somebody out sets
the virtual time to the least virtual service of those; a step that leaves nobody out settles all accounts. No account
is ever worth less than the virtual time, so silence earns nothing, and using what nobody wanted costs nothing.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from heapq import heappop, heappush, merge

VIRTUAL_UNIT = 1 << 20
"""Virtual service is an integer: cost * VIRTUAL_UNIT / weight, so a charge is rounded by less than a millionth."""

_FEW_ACCOUNTS = 1024  # so many are kept without a thought
_PRUNED_PER_STEP = 1024  # so many are looked at in one step, so that no step is late for it


Place = tuple[int, int, str]
"""Virtual service when it was last looked at, order of entry, account."""


class FairShare:
    """Virtual service of each account, all at least `virtual_time`. An account that was never charged is at it.

    Accounts in line are kept sorted by virtual service, each rank in a line of its own. Service grows, so a place is
    mended only when somebody looks at it: charging one who is far from the head of the line costs nothing.
    """

    def __init__(self) -> None:
        self.virtual_time = 0
        self._virtual_service: dict[str, int] = {}
        self._by_service: list[tuple[int, str]] = []  # heap of (what it was served when last looked at, account)
        self._highest = 0
        self._lines: list[list[Place]] = []  # by rank
        self._places: dict[str, tuple[int, Place]] = {}  # rank and place of each account in line
        self._num_entered = 0

    def virtual_service(self, account: str) -> int:
        """What the account was served, by weight, in VIRTUAL_UNITs; never less than `virtual_time`."""
        service = self._virtual_service.get(account, 0)
        return service if service > self.virtual_time else self.virtual_time

    def charge(self, account: str, cost: int, weight: int) -> None:
        """Add `cost` (negative: a refund) of an account whose share is `weight`."""
        service = self._virtual_service.get(account)
        if service is None:
            service = self.virtual_time
            heappush(self._by_service, (service, account))
        elif service < self.virtual_time:
            service = self.virtual_time
        if cost < 0:
            service -= -cost * VIRTUAL_UNIT // weight
            if account in self._places:
                self._move(account, service)
        else:
            service += cost * VIRTUAL_UNIT // weight
            if service > self._highest:
                self._highest = service
        self._virtual_service[account] = service

    # -- the line

    def enter(self, account: str, rank: int = 0) -> None:
        """Put the account in line, or change its rank; it keeps its turn among equals."""
        if account in self._places:
            old_rank, (_, entered, _) = self._places[account]
            if old_rank == rank:
                return
            self.leave(account)
        else:
            self._num_entered += 1
            entered = self._num_entered
        while len(self._lines) <= rank:
            self._lines.append([])
        place = (self.virtual_service(account), entered, account)
        self._places[account] = (rank, place)
        insort(self._lines[rank], place)

    def leave(self, account: str) -> None:
        """Take the account out of its line."""
        rank, place = self._places.pop(account)
        del self._lines[rank][bisect_left(self._lines[rank], place)]

    def lines(self) -> Iterator[Iterator[Place]]:
        """The accounts in line as (virtual service, order of entry, account), least served first; a line a rank.

        Nobody may be charged or enter or leave while one of the lines is read.
        """
        return (self._line(rank) for rank in range(len(self._lines)))

    def in_order(self) -> Iterator[Place]:
        """All accounts in line, whatever their rank, least served first."""
        return merge(*self.lines())

    def _line(self, rank: int) -> Iterator[Place]:
        line, index = self._lines[rank], 0
        while index < len(line):
            place = line[index]
            service = self.virtual_service(place[2])
            if service > place[0]:
                self._move(place[2], service)
            else:
                yield place
                index += 1

    def _move(self, account: str, service: int) -> None:
        rank, place = self._places[account]
        line = self._lines[rank]
        del line[bisect_left(line, place)]
        place = (service, place[1], account)
        self._places[account] = (rank, place)
        insort(line, place)

    # -- the virtual time

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
            self._by_service.clear()
        else:
            self.virtual_time = least
            self._prune()

    def _prune(self) -> None:
        """Forget accounts that the virtual time has passed: they are worth no more than one that was never charged."""
        heap = self._by_service
        for _ in range(_PRUNED_PER_STEP):
            if len(heap) <= _FEW_ACCOUNTS or heap[0][0] > self.virtual_time:
                return
            _, account = heappop(heap)
            service = self._virtual_service[account]
            if service > self.virtual_time:
                heappush(heap, (service, account))
            else:
                del self._virtual_service[account]
