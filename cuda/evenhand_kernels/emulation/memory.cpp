// What a kernel may touch, and in which order: bounds, alignment, initialised shared memory, races.
//
// The compiler calls the functions __tsan_* before every access of a kernel's code (-fsanitize=thread, without its
// library); what the intrinsics touch, they report themselves. Memory is watched in cells of four bytes: two threads that
// write halves of one cell count as a race, and kernels here write whole cells.
#include <sys/mman.h>

#include <cstdio>
#include <cstring>

#include "block.h"

namespace emu {

using Mark = uint64_t;

struct Shadow {
  Mark write, read[2];
};

namespace {

const char* name(Access kind) {
  switch (kind) {
    case Access::read: return "reads";
    case Access::write: return "writes";
    default: return "updates";
  }
}

std::string thread_name(unsigned thread) {
  if (thread > block->num_threads) return "a product of warpgroup " + std::to_string(thread - block->num_threads - 1);
  return thread == block->num_threads ? "an asynchronous operation" : "thread " + std::to_string(thread);
}

[[noreturn]] void fail_race(const char* what, const char* place, uint64_t offset, unsigned bytes, const char* before,
                            const std::string& other) {
  fail("race: %s %u bytes at byte %llu of %s that %s %s, without a barrier between", what, bytes,
       static_cast<unsigned long long>(offset), place, other.c_str(), before);
}

// ---------------------------------------------------------------------------------------------- global memory

// Who touched a cell of global memory last, in one word: block + 1, atomic or not, thread, clock since the block's first.
constexpr unsigned BLOCK_SHIFT = 40, ATOMIC_SHIFT = 39, THREAD_SHIFT = 28;

size_t shadow_bytes(const Buffer& buffer) { return (buffer.bytes / 4 + 2) * sizeof(Shadow); }

Mark mark(Access kind) {
  return uint64_t{block->number + 1u} << BLOCK_SHIFT | uint64_t{kind == Access::atomic} << ATOMIC_SHIFT |
         uint64_t{fiber->id} << THREAD_SHIFT | ((fiber->clock - block->first) & ((1u << THREAD_SHIFT) - 1));
}

Mark load(const Mark& from) { return __atomic_load_n(&from, __ATOMIC_RELAXED); }
void store(Mark& into, Mark value) { __atomic_store_n(&into, value, __ATOMIC_RELAXED); }

unsigned thread_of(Mark mark) { return mark >> THREAD_SHIFT & 0x7FF; }
bool is_atomic(Mark mark) { return mark >> ATOMIC_SHIFT & 1; }
bool same_block(Mark mark) { return mark >> BLOCK_SHIFT == block->number + 1u; }

bool before_me(Mark mark) {
  if (!mark) return true;
  return same_block(mark) && ordered(thread_of(mark), block->first + (mark & ((1u << THREAD_SHIFT) - 1)));
}

std::string owner(Mark mark) {
  std::string thread = "thread " + std::to_string(thread_of(mark));
  return same_block(mark) ? thread : thread + " of block " + std::to_string((mark >> BLOCK_SHIFT) - 1);
}

void watch_global(const Buffer& buffer, Shadow* cells, const char* address, unsigned bytes, Access kind) {
  uint64_t offset = address - buffer.begin;
  Mark mine = mark(kind);
  for (uint64_t cell = offset / 4; cell <= (offset + bytes - 1) / 4; cell++) {
    Shadow& shadow = cells[cell];
    Mark write = load(shadow.write);
    if (!before_me(write) && !(kind == Access::atomic && is_atomic(write)))
      fail_race(name(kind), buffer.name, offset, bytes, is_atomic(write) ? "updates" : "writes", owner(write));
    if (kind == Access::read) {
      Mark first = load(shadow.read[0]);
      if (before_me(first)) store(shadow.read[0], mine);
      else store(shadow.read[1], mine);
      continue;
    }
    for (Mark& slot : shadow.read) {
      Mark read = load(slot);
      if (!before_me(read)) fail_race(name(kind), buffer.name, offset, bytes, "reads", owner(read));
    }
    store(shadow.write, mine);
  }
}

[[noreturn]] void fail_bounds(const char* address, unsigned bytes, Access kind) {
  const Launch& launch = *block->launch;
  const Buffer* nearest = nullptr;
  uint64_t least = 1 << 24;
  for (unsigned index = 0; index < launch.num_buffers; index++) {
    const Buffer& buffer = launch.buffers[index];
    uint64_t distance = address < buffer.begin ? buffer.begin - address : address - buffer.begin - buffer.bytes;
    if (distance < least) least = distance, nearest = &buffer;
  }
  if (!nearest) fail("%s %u bytes at %p, which is in none of its buffers", name(kind), bytes, address);
  fail("%s %u bytes at byte %lld of %s, which has %llu", name(kind), bytes,
       static_cast<long long>(address - nearest->begin), nearest->name,
       static_cast<unsigned long long>(nearest->bytes));
}

// ---------------------------------------------------------------------------------------------- shared memory

void watch_shared(uint32_t offset, unsigned bytes, Access kind) {
  for (uint32_t index = offset / 4; index <= (offset + bytes - 1) / 4; index++) {
    Cell& cell = block->cells[index];
    if (touched(cell.write_clock)) {
      if (cell.pending)
        fail("%s byte %u of shared memory, which an asynchronous copy of %s may still be writing", name(kind), offset,
             thread_name(cell.writer).c_str());
      if (!ordered(cell.writer, cell.write_clock) && !(kind == Access::atomic && cell.atomic))
        fail_race(name(kind), "shared memory", offset, bytes, "writes", thread_name(cell.writer));
    } else if (kind == Access::read || kind == Access::atomic) {
      fail("%s byte %u of shared memory, which nobody has written", name(kind), offset);
    }
    if (kind == Access::read) {
      mark_read(index * 4, 4, fiber->id, fiber->clock);
      continue;
    }
    for (int slot = 0; slot < 2; slot++)
      if (touched(cell.read_clock[slot]) && !ordered(cell.reader[slot], cell.read_clock[slot]))
        fail_race(name(kind), "shared memory", offset, bytes, "reads", thread_name(cell.reader[slot]));
    cell.write_clock = fiber->clock;
    cell.writer = fiber->id;
    cell.atomic = kind == Access::atomic;
    cell.pending = false;  // an earlier block may have ended with a copy in flight
  }
}

void check_alignment(const void* address, unsigned bytes, Access kind) {
  if (reinterpret_cast<uintptr_t>(address) % bytes)
    fail("misaligned: %s %u bytes at %p, which is no multiple of %u", name(kind), bytes, address, bytes);
}

}  // namespace

bool touched(Clock clock) { return clock >= block->first; }

void mark_written(uint32_t offset, unsigned bytes, unsigned thread, Clock clock, bool pending) {
  for (uint32_t index = offset / 4; index < (offset + bytes + 3) / 4; index++) {
    Cell& cell = block->cells[index];
    cell.write_clock = clock;
    cell.writer = thread;
    cell.atomic = 0;
    cell.pending = pending;
  }
}

// Of many readers two are kept, of different warps where there are such.
void mark_read(uint32_t offset, unsigned bytes, unsigned thread, Clock clock) {
  for (uint32_t index = offset / 4; index < (offset + bytes + 3) / 4; index++) {
    Cell& cell = block->cells[index];
    bool old = !touched(cell.read_clock[0]) || ordered(cell.reader[0], cell.read_clock[0]);
    int slot = old || cell.reader[0] / WARP == thread / WARP ? 0 : 1;
    cell.read_clock[slot] = clock;
    cell.reader[slot] = thread;
  }
}

uint32_t shared_offset(const void* address, unsigned bytes, const char* what) {
  int64_t offset = static_cast<const char*>(address) - block->shared;
  int64_t size = block->launch->shared_bytes;
  if (offset < 0 || offset + bytes > size)
    fail("%s %u bytes at byte %lld of shared memory, which has %lld", what, bytes, static_cast<long long>(offset),
         static_cast<long long>(size));
  return static_cast<uint32_t>(offset);
}

void access_shared(uint32_t offset, unsigned bytes, Access kind) {
  if (block->launch->checked) watch_shared(offset, bytes, kind);
}

void access_global(const void* address, unsigned bytes, Access kind) {
  const Launch& launch = *block->launch;
  if (!launch.checked) return;
  const char* place = static_cast<const char*>(address);
  for (unsigned step = 0, index = block->last_buffer; step < launch.num_buffers; step++, index++) {
    if (index >= launch.num_buffers) index = 0;
    const Buffer& buffer = launch.buffers[index];
    if (place < buffer.begin || place + bytes > buffer.begin + buffer.bytes) continue;
    block->last_buffer = index;
    if (Shadow* cells = block->shadows[index]) return watch_global(buffer, cells, place, bytes, kind);
    if (kind != Access::read) fail("%s %s, which is const", name(kind), buffer.name);
    return;
  }
  fail_bounds(place, bytes, kind);
}

void access(const void* address, unsigned bytes, Access kind) {
  auto place = reinterpret_cast<uintptr_t>(address);
  if (place - reinterpret_cast<uintptr_t>(fiber->stack) < STACK_BYTES) return;
  check_alignment(address, bytes, kind);
  uintptr_t shared = reinterpret_cast<uintptr_t>(block->shared);
  if (place + 4096 - shared < 264 * 1024) return access_shared(shared_offset(address, bytes, name(kind)), bytes, kind);
  access_global(address, bytes, kind);
}

Shadows open_shadows(const Launch& launch) {
  Shadows shadows;
  for (unsigned index = 0; index < launch.num_buffers; index++) {
    const Buffer& buffer = launch.buffers[index];
    void* cells = nullptr;
    if (launch.checked && buffer.writable && buffer.bytes)
      cells = mmap(nullptr, shadow_bytes(buffer), PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    shadows.push_back(static_cast<Shadow*>(cells));
  }
  return shadows;
}

void close_shadows(const Launch& launch, const Shadows& shadows) {
  for (unsigned index = 0; index < launch.num_buffers; index++)
    if (shadows[index]) munmap(shadows[index], shadow_bytes(launch.buffers[index]));
}

#define EMU_HOOK(bytes)                                                                        \
  extern "C" void __tsan_read##bytes(void* address) {                                          \
    EMU_SITE();                                                                                \
    access(address, bytes, Access::read);                                                      \
  }                                                                                            \
  extern "C" void __tsan_write##bytes(void* address) {                                         \
    EMU_SITE();                                                                                \
    access(address, bytes, Access::write);                                                     \
  }                                                                                            \
  extern "C" void __tsan_unaligned_read##bytes(void* address) {                                \
    EMU_SITE();                                                                                \
    access(address, bytes, Access::read);                                                      \
  }                                                                                            \
  extern "C" void __tsan_unaligned_write##bytes(void* address) {                               \
    EMU_SITE();                                                                                \
    access(address, bytes, Access::write);                                                     \
  }
EMU_HOOK(1)
EMU_HOOK(2)
EMU_HOOK(4)
EMU_HOOK(8)
EMU_HOOK(16)
#undef EMU_HOOK

namespace {

void access_range(char* address, unsigned long bytes, Access kind) {
  for (unsigned long done = 0; done < bytes; done += 4)
    access(address + done, static_cast<unsigned>(bytes - done < 4 ? 1 : 4), kind);
}

}  // namespace

extern "C" void __tsan_read_range(void* address, unsigned long bytes) {
  EMU_SITE();
  access_range(static_cast<char*>(address), bytes, Access::read);
}
extern "C" void __tsan_write_range(void* address, unsigned long bytes) {
  EMU_SITE();
  access_range(static_cast<char*>(address), bytes, Access::write);
}
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}

// Vector accesses of a kernel: one instruction on the device, so aligned as one here.
extern "C" void emu_access(const void* address, unsigned bytes, int kind) {
  EMU_SITE();
  if (block->launch->checked) access(address, bytes, static_cast<Access>(kind));
}

}  // namespace emu
