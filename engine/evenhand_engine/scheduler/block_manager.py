"""BlockManager: owner of the KV cache's blocks: who holds which, what may be reused, what is evicted.

A block is in exactly one of three states:

    free        in `_free`; content worthless
    referenced  in the block table of one request or more (`_holders` is not empty)
    cached      unreferenced, but its content is a known prefix; evicted, least recently used first, when no free block is
                left, and those that a tenant's guarantee keeps after all others

Full blocks are known by a hash chained over the salt and all tokens up to their end, so that equal prompts with equal
salts share blocks, and nobody learns by timing what a tenant with another salt has asked. A block counts to the tenant
that filled or revived it for as long as that tenant references it, then to another that does.
"""

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping

from evenhand_engine.scheduler.request import Request

_SHARED = ""  # eviction line of all tenants without a guarantee


class BlockManager:
    """Allocates blocks of `block_size` tokens. Never blocks, never fails halfway: it does a thing whole or not."""

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_prefix_queries = 0  # tokens looked up on admission
        self.num_prefix_hits = 0  # tokens found
        self._enable_prefix_caching = enable_prefix_caching
        self._free = list(range(num_blocks - 1, -1, -1))
        self._holders: list[list[str]] = [[] for _ in range(num_blocks)]  # tenant of each request that references it
        self._owner: list[str] = [""] * num_blocks  # tenant that it counts to, or did last
        self._hash: list[bytes | None] = [None] * num_blocks
        self._block_of_hash: dict[bytes, int] = {}
        self._expected: Counter[bytes] = Counter()  # hashes of blocks that batches in flight will have filled
        self._held: Counter[str] = Counter()  # referenced blocks by owner
        self._cached: dict[str, OrderedDict[int, int]] = {_SHARED: OrderedDict()}  # block: when it was last used
        self._num_cached = 0
        self._num_uses = 0
        self._guarantees: dict[str, int] = {}

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be allocated now: free ones and cached ones."""
        return len(self._free) + self._num_cached

    @property
    def guarantees(self) -> Mapping[str, int]:
        """Blocks guaranteed to each tenant that has a guarantee."""
        return self._guarantees

    def num_held_blocks(self, tenant_id: str) -> int:
        """Referenced blocks that count to the tenant."""
        return self._held[tenant_id]

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def set_guarantees(self, guarantees: Mapping[str, int]) -> None:
        """Blocks guaranteed to each tenant that has a guarantee: its cached blocks are evicted after all others while
        those that it holds and those cached for it are together no more than that."""
        self._guarantees = {tenant_id: blocks for tenant_id, blocks in guarantees.items() if blocks > 0}
        self._sort_into_lines()

    def transfer(self, tenant_id: str, heir_id: str) -> None:
        """All blocks of a tenant count to another from now on."""
        self._owner = [heir_id if owner == tenant_id else owner for owner in self._owner]
        for holders in self._holders:
            holders[:] = [heir_id if holder == tenant_id else holder for holder in holders]
        self._held[heir_id] += self._held.pop(tenant_id, 0)
        self._sort_into_lines()

    # -- allocation

    def cached_prefix(self, request: Request) -> list[int]:
        """Blocks that hold the longest known prefix of the request. Its last token is never part of it, since somebody
        must compute the logits."""
        if not self._enable_prefix_caching or not request.may_use_prefixes:
            return []
        blocks = []
        for digest in self._hashes(request, (len(request.token_ids) - 1) // self.block_size):
            block = self._block_of_hash.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_expected_hits(self, request: Request) -> int:
        """Tokens of the request's prefix that are likely to be cached: cheap, since it starts from the last answer.

        Exact but where prefixes are shared between tenants with and without a guarantee, whose blocks are evicted apart.
        """
        if not self._enable_prefix_caching or not request.may_use_prefixes:
            return 0
        most, known = (len(request.token_ids) - 1) // self.block_size, request.num_prefix_blocks
        while known and request.block_hashes[known - 1] not in self._block_of_hash:
            known -= 1
        while known < most and self._hash_of(request, known) in self._block_of_hash:
            known += 1
        request.num_prefix_blocks = known
        return known * self.block_size

    def num_missing_blocks(self, request: Request) -> int:
        """How far `num_free_blocks` must go to admit the request: new blocks, and cached ones that it would revive."""
        prefix = self.cached_prefix(request)
        revived = sum(1 for block in prefix if not self._holders[block])
        return self.num_blocks_for(request.num_tokens) - len(prefix) + revived

    def start(self, request: Request) -> bool:
        """Give a request without blocks room for all its tokens, with the longest known prefix in place; or do nothing.

        Sets `num_computed_tokens`, and `num_cached_tokens` on a first admission.
        """
        assert not request.block_table
        if self.num_missing_blocks(request) > self.num_free_blocks:
            return False
        prefix = self.cached_prefix(request)
        for block in prefix:
            self._reference(block, request.tenant_id)
        request.block_table = prefix
        request.num_computed_tokens = len(prefix) * self.block_size
        self.num_prefix_queries += request.num_tokens
        self.num_prefix_hits += request.num_computed_tokens
        grown = self.grow(request, request.num_tokens)
        assert grown
        return True

    def grow(self, request: Request, num_tokens: int) -> bool:
        """Extend the block table to `num_tokens` tokens, or do nothing and return False."""
        num_new = self.num_blocks_for(num_tokens) - len(request.block_table)
        if num_new > self.num_free_blocks:
            return False
        for _ in range(num_new):
            block = self._free.pop() if self._free else self._evict()
            self._own(block, request.tenant_id)
            self._holders[block].append(request.tenant_id)
            request.block_table.append(block)
        return True

    def commit(self, request: Request, start: int, end: int) -> None:
        """Make the blocks that the request's tokens [start, end), computed now, have filled known for reuse."""
        first, last = start // self.block_size, min(end // self.block_size, len(request.block_table))
        if not self._enable_prefix_caching or first >= last:
            return
        for index in range(first, last):
            block, digest = request.block_table[index], self._hash_of(request, index)
            if self._hash[block] is None and digest not in self._block_of_hash:
                self._hash[block] = digest
                self._block_of_hash[digest] = block

    def expect(self, request: Request, start: int, end: int) -> list[bytes]:
        """A batch is about to fill the full blocks of the prompt's tokens [start, end); returns their hashes, which
        `forget` takes when the batch's results are known, whatever came of it."""
        if not self._enable_prefix_caching:
            return []
        blocks = range(start // self.block_size, min(end, len(request.token_ids)) // self.block_size)
        digests = [self._hash_of(request, index) for index in blocks]
        self._expected.update(digests)
        return digests

    def forget(self, digests: list[bytes]) -> None:
        """The batch that `expect` announced has its results."""
        for digest in digests:
            self._expected[digest] -= 1
            if not self._expected[digest]:
                del self._expected[digest]

    def is_next_block_expected(self, request: Request) -> bool:
        """Whether a batch in flight computes the first block of the request's prompt that is not known yet."""
        if not self._expected or not request.may_use_prefixes:
            return False
        index = len(self.cached_prefix(request))
        has_more = index < (len(request.token_ids) - 1) // self.block_size
        return has_more and self._hash_of(request, index) in self._expected

    def num_references(self, block: int) -> int:
        """How many requests hold the block."""
        return len(self._holders[block])

    def num_reclaimable_blocks(self, request: Request) -> int:
        """How many blocks `release` of the request would make available."""
        return sum(1 for block in request.block_table if len(self._holders[block]) == 1)

    def release(self, request: Request) -> None:
        """Drop the request's blocks; those with known content stay cached. The end of a prefix is evicted first."""
        for block in reversed(request.block_table):
            holders = self._holders[block]
            holders.remove(request.tenant_id)
            if holders:
                if self._owner[block] not in holders:
                    self._held[self._owner[block]] -= 1
                    self._own(block, holders[0])
            else:
                self._held[self._owner[block]] -= 1
                if self._hash[block] is None:
                    self._free.append(block)
                else:
                    self._num_uses += 1
                    self._cached[self._line_of(block)][block] = self._num_uses
                    self._num_cached += 1
        request.block_table = []
        request.num_computed_tokens = 0

    def check_integrity(self) -> None:
        """Assert that every block is in exactly one state and every count is right. For tests and idle moments."""
        cached = [block for line in self._cached.values() for block in line]
        referenced = [block for block, holders in enumerate(self._holders) if holders]
        assert sorted((*self._free, *cached, *referenced)) == list(range(self.num_blocks))
        assert self._num_cached == len(cached)
        assert all(line == self._line_of(block) for line, blocks in self._cached.items() for block in blocks)
        assert all(list(blocks.values()) == sorted(blocks.values()) for blocks in self._cached.values())
        assert +self._held == Counter(self._owner[block] for block in referenced)
        assert all(self._owner[block] in self._holders[block] for block in referenced)
        assert all(self._hash[block] is not None for block in cached)
        assert all(self._hash[block] is None for block in self._free)
        assert {d: b for b, d in enumerate(self._hash) if d is not None} == self._block_of_hash

    # -- inside

    def _reference(self, block: int, tenant_id: str) -> None:
        if not self._holders[block]:
            del self._cached[self._line_of(block)][block]
            self._num_cached -= 1
            self._own(block, tenant_id)
        self._holders[block].append(tenant_id)

    def _own(self, block: int, tenant_id: str) -> None:
        """The block counts to the tenant from now on."""
        self._owner[block] = tenant_id
        self._held[tenant_id] += 1

    def _evict(self) -> int:
        """Free the least recently used of the cached blocks that no guarantee keeps; if all are kept, of all."""
        lines = [line for line, blocks in self._cached.items() if blocks]
        unkept = [line for line in lines if self._is_beyond_guarantee(line)]
        line = min(unkept or lines, key=lambda line: next(iter(self._cached[line].values())))
        block, _ = self._cached[line].popitem(last=False)
        self._num_cached -= 1
        digest = self._hash[block]
        assert digest is not None
        del self._block_of_hash[digest]
        self._hash[block] = None
        return block

    def _is_beyond_guarantee(self, line: str) -> bool:
        """Whether the line's tenant keeps more than it is guaranteed, in use and cached; nothing keeps the shared line."""
        return line == _SHARED or self._held[line] + len(self._cached[line]) > self._guarantees[line]

    def _sort_into_lines(self) -> None:
        """Put every cached block into its line anew, least recently used first."""
        used = sorted((used, block) for line in self._cached.values() for block, used in line.items())
        self._cached = {line: OrderedDict() for line in (_SHARED, *self._guarantees)}
        for when, block in used:
            self._cached[self._line_of(block)][block] = when

    def _line_of(self, block: int) -> str:
        """Eviction line of a cached block: its tenant's, if that has a guarantee."""
        owner = self._owner[block]
        return owner if owner in self._guarantees else _SHARED

    def _hashes(self, request: Request, num_blocks: int) -> Iterator[bytes]:
        """Hashes of the request's first full blocks, chained."""
        return (self._hash_of(request, index) for index in range(num_blocks))

    def _hash_of(self, request: Request, index: int) -> bytes:
        """Hash of a full block and all before it; computed once, in order, and kept with the request."""
        hashes, size = request.block_hashes, self.block_size
        while len(hashes) <= index:
            parent = hashes[-1] if hashes else hashlib.sha256(request.cache_salt.encode()).digest()
            start = len(hashes) * size
            tokens = request.token_ids[start : start + size].tobytes()
            hashes.append(hashlib.blake2b(parent + tokens, digest_size=16).digest())
        return hashes[index]
