"""Which cached blocks go first: the least recently used that no guarantee keeps."""

from evenhand_engine.scheduler.block_manager import BlockManager
from evenhand_engine.scheduler.request import Request, SamplingParams

BLOCK_SIZE = 4


class Cache:
    """Ten blocks, filled by requests that came and went."""

    def __init__(self, **guarantees: int) -> None:
        self.blocks = BlockManager(10, BLOCK_SIZE)
        self.blocks.set_guarantees(guarantees)
        self._num_requests = 0

    def use(self, tenant_id: str, first_token: int, num_blocks: int) -> int:
        """Compute a prompt of full blocks and end it; returns how many of its blocks were found cached."""
        self._num_requests += 1
        tokens = list(range(first_token, first_token + num_blocks * BLOCK_SIZE + 1))
        request = Request(f"{self._num_requests}", tenant_id, tokens, SamplingParams(max_tokens=1), 0.0)
        assert self.blocks.start(request)
        num_found = request.num_computed_tokens // BLOCK_SIZE
        self.blocks.commit(request, request.num_computed_tokens, num_blocks * BLOCK_SIZE)
        self.blocks.release(request)
        self.blocks.check_integrity()
        return num_found

    def num_cached(self, tenant_id: str, first_token: int, num_blocks: int) -> int:
        tokens = list(range(first_token, first_token + num_blocks * BLOCK_SIZE + 1))
        return len(self.blocks.cached_prefix(Request("", tenant_id, tokens, SamplingParams(max_tokens=1), 0.0)))


def test_a_small_guarantee_does_not_take_the_whole_cache() -> None:
    cache = Cache(owner=1)
    for first_token in range(0, 3000, 100):
        cache.use("owner", first_token, 2)
        assert cache.use("other", 10_000, 2) == (2 if first_token else 0), "what was used last is evicted last"


def test_what_is_within_a_guarantee_outlives_what_was_used_later() -> None:
    cache = Cache(owner=4)
    cache.use("owner", 0, 3)
    for first_token in range(1000, 3000, 100):
        cache.use("other", first_token, 3)
    assert cache.num_cached("owner", 0, 3) == 3


def test_beyond_its_guarantee_a_tenant_loses_what_it_used_first() -> None:
    cache = Cache(owner=3)
    cache.use("owner", 0, 3)
    cache.use("owner", 100, 3)
    cache.use("other", 1000, 6)
    assert (cache.num_cached("owner", 0, 3), cache.num_cached("owner", 100, 3)) == (0, 3)


def test_when_all_is_guaranteed_the_least_recently_used_goes() -> None:
    cache = Cache(first=5, second=5)
    cache.use("first", 0, 5)
    cache.use("second", 100, 5)
    cache.use("first", 0, 5)
    cache.use("other", 1000, 1)
    assert (cache.num_cached("first", 0, 5), cache.num_cached("second", 100, 5)) == (5, 3)


def test_the_order_of_use_survives_a_change_of_guarantees_and_heirs() -> None:
    cache = Cache(a=1, b=1)
    for tenant_id, first_token in (("a", 0), ("b", 100), ("a", 200), ("b", 300)):
        cache.use(tenant_id, first_token, 2)
    cache.blocks.set_guarantees({})
    cache.blocks.transfer("a", "c")
    cache.blocks.transfer("b", "c")
    cache.blocks.check_integrity()
    cache.use("c", 1000, 6)
    found = [cache.num_cached("c", first_token, 2) for first_token in (0, 100, 200, 300)]
    assert found == [0, 0, 1, 2], "the oldest are gone"
