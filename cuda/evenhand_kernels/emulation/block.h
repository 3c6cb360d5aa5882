// The block that an OS thread emulates: its CUDA threads, each a fiber, and what they know of each other.
//
// Order between threads is kept as in a race detector with vector clocks (FastTrack, PLDI 2009): every thread has a clock
// that rises when it releases something (at barriers), and `seen`, the clocks of all others that it is ordered after. An
// access by thread t at clock c is ordered before what thread u does now if c <= u.seen[t]. Asynchronous engines have
// clocks too, after those of the threads: number `num_threads` is that of bulk copies, then one for each warp's part of products.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "context.h"
#include "launch.h"

namespace emu {

constexpr unsigned WARP = 32, WARPGROUP = 128;
constexpr size_t STACK_BYTES = 64 * 1024;

using Clock = uint32_t;
using Clocks = std::vector<Clock>;

enum class State : uint8_t { ready, waiting, done };

struct Copy {  // cp.async
  char* to;
  const char* from;
  unsigned bytes, zeros;
};

// Lanes of a warp that meet. The last to come does the work for all.
struct Meeting {
  const char* what = nullptr;
  unsigned arrived = 0, mask = 0;
  void* argument[WARP] = {};
};

struct Warp {
  unsigned alive = 0;
  Meeting meeting;
  Clocks seen;  // of all its lanes after a __syncwarp of the whole warp
};

struct Registers {  // as they were at a wgmma.fence
  const void* begin;
  std::vector<uint32_t> words;
};

struct Fiber {
  Context context;
  char* stack;
  unsigned id, lane;
  State state;
  const char* waits_for;
  const void* site;  // where in the kernel's code it called the emulation last
  Warp* warp;
  Clock clock;
  std::vector<Clock> fences;  // its clocks at each fence.proxy.async
  const Clock* seen;
  Clocks own_seen;
  const void* barrier;  // the mbarrier that it waits for
  std::vector<Copy> copies;      // in order of issue
  std::vector<unsigned> groups;  // how many of them had been issued at each commit
  std::vector<Registers> fenced;  // by its last wgmma.fence
  bool has_fenced;                // since it last waited for products
  unsigned committed_groups, awaited_groups;  // of products
};

// Who touched four bytes of shared memory last.
struct Cell {
  Clock write_clock;
  uint16_t writer;
  uint8_t atomic, pending;
  Clock read_clock[2];
  uint16_t reader[2];
};

struct BulkCopy {
  char* to;
  const char* from;
  unsigned bytes;
  Clock clock;
};

struct Mbarrier {
  unsigned count, pending, phase;
  int64_t missing_bytes;
  Clocks released;
  std::vector<BulkCopy> copies;
};

struct Product;  // of a warpgroup: wgmma.cpp

struct Warpgroup {
  unsigned arrived = 0;
  void* argument[WARPGROUP] = {};
  unsigned num_groups = 0;                         // that some thread has committed
  std::vector<std::shared_ptr<Product>> products;  // in flight, in order of issue
};

struct Shadow;  // of four bytes of global memory: memory.cpp

struct Block {
  const Launch* launch;
  Shadow* const* shadows;  // of each buffer of the launch; null where it is read only
  void (*entry)(const void*);
  const void* arguments;
  unsigned arguments_bytes;
  unsigned index[3];
  unsigned number;
  unsigned num_threads, num_clocks, alive, at_barrier;
  int votes[3], results[3];
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<Warpgroup> warpgroups;
  std::map<uint32_t, Mbarrier> mbarriers;
  Clocks seen;  // of all threads after a barrier of the block
  Clock first;  // what was touched at an earlier clock was touched by another block
  Clock async_clock;
  char* stacks = nullptr;
  size_t stack_bytes = 0;
  char* shared = nullptr;
  Cell* cells = nullptr;
  Context main;
  uint64_t random;
  unsigned last_buffer;
  std::string error;
  uint64_t site;
};

extern thread_local Block* block __attribute__((tls_model("initial-exec")));
extern thread_local Fiber* fiber __attribute__((tls_model("initial-exec")));

// scheduler.cpp
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
void wait_for(const char* what);  // let others run until somebody makes this fiber ready
void let_others_run();            // in random order: perhaps another fiber first
void run_block(Block& block, unsigned number);

// Who reads for a warpgroup's products, as a cell remembers it.
inline unsigned product_reader(unsigned warpgroup) { return block->num_threads + 1 + warpgroup; }
inline unsigned product_clock(unsigned warp) { return block->num_threads + 1 + warp; }

inline bool ordered(unsigned thread, Clock clock) {
  if (thread <= block->num_threads) return thread == fiber->id || clock <= fiber->seen[thread];
  const Clock* warps = fiber->seen + product_clock((thread - block->num_threads - 1) * (WARPGROUP / WARP));
  for (unsigned warp = 0; warp < WARPGROUP / WARP; warp++)  // who has waited knows of its own warp's part
    if (clock > warps[warp]) return false;
  return true;
}

// Waits for all threads of `mask`; the last runs `work`, whose result all may then read through their arguments.
template <class Work>
inline void meet_in_warp(const char* what, unsigned mask, void* argument, Work work) {
  Meeting& meeting = fiber->warp->meeting;
  mask &= fiber->warp->alive;
  if (!(mask >> fiber->lane & 1)) fail("%s: its own lane %u is not in the mask %08x", what, fiber->lane, mask);
  if (!meeting.arrived) {
    meeting.what = what;
    meeting.mask = mask;
  } else if (meeting.what != what || meeting.mask != mask) {
    fail("%s with lanes %08x, while lanes %08x of its warp are at %s with lanes %08x", what, mask, meeting.arrived,
         meeting.what, meeting.mask);
  }
  meeting.argument[fiber->lane] = argument;
  meeting.arrived |= 1u << fiber->lane;
  if (meeting.arrived != mask) return wait_for(what);
  meeting.arrived = 0;
  work(meeting);
  for (unsigned lane = 0; lane < WARP; lane++)
    if (mask >> lane & 1) block->fibers[fiber->id - fiber->lane + lane].state = State::ready;
  let_others_run();
}

// memory.cpp
enum class Access : uint8_t { read, write, atomic };
void access(const void* address, unsigned bytes, Access kind);      // shared or global, after bounds and alignment
void access_global(const void* address, unsigned bytes, Access kind);
uint32_t shared_offset(const void* address, unsigned bytes, const char* what);  // fails outside of shared memory
void access_shared(uint32_t offset, unsigned bytes, Access kind);
void mark_written(uint32_t offset, unsigned bytes, unsigned thread, Clock clock, bool pending);
void mark_read(uint32_t offset, unsigned bytes, unsigned thread, Clock clock);
bool touched(Clock clock);  // by this block
using Shadows = std::vector<Shadow*>;
Shadows open_shadows(const Launch& launch);
void close_shadows(const Launch& launch, const Shadows& shadows);

// synchronization.cpp
Clock* own_clocks(Fiber& fiber);             // what it has seen, to be changed
void merge(Clock* into, const Clock* other);

}  // namespace emu

// The kernel's code that called the function in which this stands.
#define EMU_SITE() (emu::fiber->site = __builtin_return_address(0))
