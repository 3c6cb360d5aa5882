// __syncwarp, votes and shuffles, atomics, mbarriers, and the copies that complete at them.
#include <algorithm>
#include <cstring>

#include "block.h"

namespace emu {

Clock* own_clocks(Fiber& one) {
  Clocks& own = one.own_seen;
  if (own.size() != block->num_clocks || one.seen != own.data()) {
    own.assign(one.seen, one.seen + block->num_clocks);
    one.seen = own.data();
  }
  return own.data();
}

void merge(Clock* into, const Clock* other) {
  for (unsigned index = 0; index < block->num_clocks; index++) into[index] = std::max(into[index], other[index]);
}

namespace {

void join_lanes(unsigned mask) {
  Fiber* lanes = &block->fibers[fiber->id - fiber->lane];
  Clocks joined(lanes[__builtin_ctz(mask)].seen, lanes[__builtin_ctz(mask)].seen + block->num_clocks);
  const Clock* merged = lanes[__builtin_ctz(mask)].seen;
  for (unsigned rest = mask; rest; rest &= rest - 1) {
    Fiber& lane = lanes[__builtin_ctz(rest)];
    if (lane.seen != merged) merge(joined.data(), lane.seen);
  }
  for (unsigned rest = mask; rest; rest &= rest - 1) {
    Fiber& lane = lanes[__builtin_ctz(rest)];
    joined[lane.id] = lane.clock++;
  }
  if (mask == fiber->warp->alive) {
    std::copy(joined.begin(), joined.end(), fiber->warp->seen.begin());
    for (unsigned rest = mask; rest; rest &= rest - 1) lanes[__builtin_ctz(rest)].seen = fiber->warp->seen.data();
  } else {
    for (unsigned rest = mask; rest; rest &= rest - 1)
      std::copy(joined.begin(), joined.end(), own_clocks(lanes[__builtin_ctz(rest)]));
  }
}

struct Shuffle {
  uint32_t value, result;
  unsigned lane;
};

struct Vote {
  int value;
  unsigned result;
};

}  // namespace

extern "C" void emu_syncwarp(unsigned mask) {
  EMU_SITE();
  mask &= fiber->warp->alive;
  meet_in_warp("__syncwarp()", mask, nullptr, [mask](Meeting&) {
    if (block->launch->checked) join_lanes(mask);
  });
}

// A lane below 32 to read from, in the whole warp.
extern "C" uint32_t emu_shuffle(unsigned mask, uint32_t value, unsigned lane) {
  EMU_SITE();
  Shuffle mine{value, 0, lane};
  meet_in_warp("a shuffle", mask, &mine, [](Meeting& meeting) {
    for (unsigned rest = meeting.mask; rest; rest &= rest - 1) {
      auto* one = static_cast<Shuffle*>(meeting.argument[__builtin_ctz(rest)]);
      if (!(meeting.mask >> one->lane & 1))
        fail("a shuffle reads from lane %u, which takes no part in it (lanes %08x)", one->lane, meeting.mask);
      one->result = static_cast<Shuffle*>(meeting.argument[one->lane])->value;
    }
  });
  return mine.result;
}

extern "C" unsigned emu_ballot(unsigned mask, int value) {
  EMU_SITE();
  Vote mine{value, 0};
  meet_in_warp("a vote", mask, &mine, [](Meeting& meeting) {
    unsigned result = 0;
    for (unsigned rest = meeting.mask; rest; rest &= rest - 1)
      if (static_cast<Vote*>(meeting.argument[__builtin_ctz(rest)])->value) result |= 1u << __builtin_ctz(rest);
    for (unsigned rest = meeting.mask; rest; rest &= rest - 1)
      static_cast<Vote*>(meeting.argument[__builtin_ctz(rest)])->result = result;
  });
  return mine.result;
}

extern "C" uint32_t emu_atomic_add32(uint32_t* address, uint32_t value) {
  EMU_SITE();
  if (block->launch->checked) access(address, 4, Access::atomic);
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}

extern "C" uint32_t emu_atomic_or32(uint32_t* address, uint32_t value) {
  EMU_SITE();
  if (block->launch->checked) access(address, 4, Access::atomic);
  return __atomic_fetch_or(address, value, __ATOMIC_RELAXED);
}

extern "C" uint64_t emu_atomic_add64(uint64_t* address, uint64_t value) {
  EMU_SITE();
  if (block->launch->checked) access(address, 8, Access::atomic);
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}

// ---------------------------------------------------------------------------------------------------- mbarrier

namespace {

Mbarrier& find(const void* address, const char* what) {
  uint32_t offset = shared_offset(address, 8, what);
  access_shared(offset, 8, Access::read);  // it must have been initialised, and a barrier lie between
  auto found = block->mbarriers.find(offset);
  if (found == block->mbarriers.end()) fail("%s byte %u of shared memory, where no mbarrier is", what, offset);
  return found->second;
}

void wake(const void* address) {
  for (Fiber& one : block->fibers)
    if (one.state == State::waiting && one.barrier == address) one.state = State::ready;
}

// Completes the phase if nothing is missing any more. Copies land only when somebody waits: as late as they may.
void advance(Mbarrier& barrier, const void* address, bool awaited) {
  if (barrier.pending) return;
  if (awaited && barrier.missing_bytes) {
    for (BulkCopy& copy : barrier.copies) {
      memcpy(copy.to, copy.from, copy.bytes);
      mark_written(static_cast<uint32_t>(copy.to - block->shared), copy.bytes, block->num_threads, copy.clock, false);
      Clock& seen = barrier.released[block->num_threads];
      seen = std::max(seen, copy.clock);
      barrier.missing_bytes -= copy.bytes;
    }
    barrier.copies.clear();
  }
  if (!barrier.missing_bytes) {
    barrier.phase ^= 1;
    barrier.pending = barrier.count;
  }
  wake(address);
}

void arrive(Mbarrier& barrier, const void* address) {
  if (!barrier.pending) fail("arrives at an mbarrier that expects nobody else in this phase");
  merge(barrier.released.data(), fiber->seen);
  Clock& seen = barrier.released[fiber->id];
  seen = std::max(seen, fiber->clock++);
  barrier.pending--;
  advance(barrier, address, false);
}

}  // namespace

extern "C" void emu_mbarrier_init(void* address, unsigned count) {
  EMU_SITE();
  uint32_t offset = shared_offset(address, 8, "initialises an mbarrier of");
  if (offset % 8) fail("misaligned: an mbarrier at byte %u of shared memory", offset);
  access_shared(offset, 8, Access::write);
  block->mbarriers[offset] = Mbarrier{count, count, 0, 0, Clocks(block->num_clocks, block->first - 1), {}};
}

extern "C" void emu_mbarrier_arrive(void* address, unsigned expected_bytes) {
  EMU_SITE();
  Mbarrier& barrier = find(address, "arrives at an mbarrier of");
  barrier.missing_bytes += expected_bytes;
  arrive(barrier, address);
}

extern "C" void emu_mbarrier_wait(void* address, unsigned parity) {
  EMU_SITE();
  for (;;) {
    Mbarrier& barrier = find(address, "waits at an mbarrier of");
    if (barrier.phase == parity) advance(barrier, address, true);
    if (barrier.phase != parity) {
      merge(own_clocks(*fiber), barrier.released.data());
      return let_others_run();
    }
    fiber->barrier = address;
    wait_for("an mbarrier");
    fiber->barrier = nullptr;
  }
}

extern "C" void emu_bulk_copy(void* to, const void* from, unsigned bytes, void* address) {
  EMU_SITE();
  if (bytes % 16 || reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16)
    fail("misaligned: cp.async.bulk of %u bytes from %p to %p", bytes, from, to);
  Mbarrier& barrier = find(address, "copies to an mbarrier of");
  access_global(from, bytes, Access::read);
  uint32_t offset = shared_offset(to, bytes, "cp.async.bulk writes");
  access_shared(offset, bytes, Access::write);
  Clock clock = ++block->async_clock;
  memset(to, 0xFF, bytes);
  mark_written(offset, bytes, block->num_threads, clock, true);
  barrier.copies.push_back({static_cast<char*>(to), static_cast<const char*>(from), bytes, clock});
}

extern "C" void emu_fence_async() {
  EMU_SITE();
  fiber->fences.push_back(fiber->clock++);
}

}  // namespace emu
