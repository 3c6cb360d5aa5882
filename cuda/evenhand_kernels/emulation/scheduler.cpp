// Runs blocks: which fiber goes next, how an error ends a launch, and how blocks are spread over OS threads.
#include <dlfcn.h>
#include <sys/mman.h>

#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <thread>

#include "block.h"

namespace emu {

thread_local Block* block = nullptr;
thread_local Fiber* fiber = nullptr;

namespace {

constexpr size_t SHARED_BYTES = 256 * 1024, GUARD_BYTES = 4096;
constexpr unsigned FIRST_CLOCK = 1, LAST_CLOCK = 1u << 31;

unsigned random_number(Block& block) {
  block.random = block.random * 6364136223846793005ull + 1442695040888963407ull;
  return static_cast<unsigned>(block.random >> 33);
}

[[noreturn]] void abandon() {
  change(fiber->context, block->main);
  __builtin_unreachable();
}

void report_deadlock() {
  for (Fiber& waiting : block->fibers)
    if (waiting.state == State::waiting) {
      fiber = &waiting;
      unsigned others = 0;
      for (Fiber& other : block->fibers) others += other.state == State::waiting && &other != &waiting;
      fail("waits for ever at %s, %u other threads of the block too, %u have ended", waiting.waits_for, others,
           block->num_threads - block->alive);
    }
}

// Goes on with the next fiber that is ready; returns when `from` is chosen again.
void go_on(Fiber* from) {
  unsigned count = block->num_threads, first = from ? from->id + 1 : 0;
  if (block->random) first = random_number(*block);
  for (unsigned step = 0; step < count; step++) {
    Fiber& next = block->fibers[(first + step) % count];
    if (next.state != State::ready) continue;
    if (&next == from) return;
    fiber = &next;
    change(from ? from->context : block->main, next.context);
    if (from) fiber = from;
    return;
  }
  if (block->alive) report_deadlock();
  if (from) change(from->context, block->main);
}

void release_barrier();

void run_fiber() {
  auto* copy = static_cast<char*>(__builtin_alloca_with_align(block->arguments_bytes, 128));
  memcpy(copy, block->arguments, block->arguments_bytes);
  block->entry(copy);
  fiber->state = State::done;
  fiber->warp->alive &= ~(1u << fiber->lane);
  block->alive--;
  if (block->alive && block->at_barrier == block->alive) release_barrier();  // who has ended counts as arrived
  go_on(fiber);
}

void release_barrier() {
  Clock* seen = block->seen.data();
  for (unsigned engine = block->num_threads; engine < block->num_clocks; engine++) {
    Clock latest = 0;
    for (Fiber& one : block->fibers) latest = std::max(latest, one.seen[engine]);
    seen[engine] = latest;
  }
  for (Fiber& one : block->fibers) seen[one.id] = one.clock;
  for (Fiber& one : block->fibers) {
    if (one.state == State::done) continue;
    one.seen = seen;
    one.clock++;
    one.state = State::ready;
  }
  block->at_barrier = 0;
  for (int vote = 0; vote < 3; vote++) block->results[vote] = block->votes[vote];
  block->votes[0] = 0, block->votes[1] = 1, block->votes[2] = 0;
}

void reserve(Block& block, unsigned num_threads) {
  if (!block.shared) {
    block.shared = static_cast<char*>(aligned_alloc(1024, SHARED_BYTES + 2 * GUARD_BYTES)) + GUARD_BYTES;
    block.cells = static_cast<Cell*>(calloc((SHARED_BYTES + GUARD_BYTES) / 4, sizeof(Cell)));
  }
  if (block.stack_bytes < num_threads * STACK_BYTES) {
    if (block.stacks) munmap(block.stacks, block.stack_bytes);
    block.stack_bytes = num_threads * STACK_BYTES;
    block.stacks = static_cast<char*>(mmap(nullptr, block.stack_bytes, PROT_READ | PROT_WRITE,
                                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  }
  block.fibers.resize(num_threads);
  block.warps.resize((num_threads + WARP - 1) / WARP);
  block.warpgroups.resize((num_threads + WARPGROUP - 1) / WARPGROUP);
}

void start(Block& block, unsigned number) {
  const Launch& launch = *block.launch;
  unsigned count = launch.num_threads;
  reserve(block, count);
  Clock last = block.first;  // so that what earlier blocks left in `cells` is older than all of this one
  for (Fiber& one : block.fibers) last = std::max(last, one.clock);
  last = std::max(last, block.async_clock);
  for (Warpgroup& group : block.warpgroups) last = std::max(last, block.first + group.num_groups);
  if (last >= LAST_CLOCK) {
    memset(block.cells, 0, (SHARED_BYTES + GUARD_BYTES) / 4 * sizeof(Cell));
    last = 0;
  }
  block.first = last + FIRST_CLOCK;
  block.async_clock = block.first;
  block.number = number;
  block.index[0] = number % launch.grid[0];
  block.index[1] = number / launch.grid[0] % launch.grid[1];
  block.index[2] = number / launch.grid[0] / launch.grid[1];
  block.num_threads = block.alive = count;
  block.num_clocks = count + 1 + static_cast<unsigned>(block.warpgroups.size()) * (WARPGROUP / WARP);
  block.at_barrier = 0;
  block.votes[0] = 0, block.votes[1] = 1, block.votes[2] = 0;
  block.random = launch.seed ? launch.seed * 2654435761u + number + 1 : 0;
  block.last_buffer = 0;
  block.mbarriers.clear();
  block.seen.assign(block.num_clocks, block.first - 1);
  memset(block.shared, 0xFF, launch.shared_bytes);  // NaN in every floating-point format
  for (unsigned index = 0; index < block.warps.size(); index++) {
    unsigned lanes = std::min(WARP, count - index * WARP);
    block.warps[index].alive = lanes == WARP ? ~0u : (1u << lanes) - 1;
    block.warps[index].meeting = Meeting();
    block.warps[index].seen.resize(block.num_clocks);
  }
  for (Warpgroup& group : block.warpgroups) group = Warpgroup();
  for (unsigned id = 0; id < count; id++) {
    Fiber& one = block.fibers[id];
    one.id = id;
    one.lane = id % WARP;
    one.warp = &block.warps[id / WARP];
    one.state = State::ready;
    one.clock = block.first;
    one.fences.clear();
    one.seen = block.seen.data();
    one.copies.clear();
    one.groups.clear();
    one.fenced.clear();
    one.has_fenced = false;
    one.committed_groups = one.awaited_groups = 0;
    one.site = nullptr;
    one.stack = block.stacks + id * STACK_BYTES;
    prepare(one.context, one.stack, STACK_BYTES, run_fiber);
  }
}

thread_local Block own_block{};

}  // namespace

void fail(const char* format, ...) {
  char text[ERROR_BYTES];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  char where[ERROR_BYTES + 200];
  snprintf(where, sizeof where, "%s: block (%u, %u, %u), thread %u: %s", block->launch->kernel, block->index[0],
           block->index[1], block->index[2], fiber->id, text);
  block->error = where;
  Dl_info info;
  if (fiber->site && dladdr(fiber->site, &info))
    block->site = static_cast<const char*>(fiber->site) - static_cast<const char*>(info.dli_fbase);
  abandon();
}

void wait_for(const char* what) {
  fiber->state = State::waiting;
  fiber->waits_for = what;
  go_on(fiber);
}

void let_others_run() {
  if (block->random) go_on(fiber);
}

void run_block(Block& one, unsigned number) {
  start(one, number);
  one.error.clear();
  one.site = 0;
  block = &one;
  go_on(nullptr);
  block = nullptr;
}

extern "C" void emu_syncthreads(int vote, int* results) {
  EMU_SITE();
  block->votes[0] += !!vote;
  block->votes[1] &= !!vote;
  block->votes[2] |= !!vote;
  if (++block->at_barrier == block->alive) {
    release_barrier();
    let_others_run();
  } else {
    wait_for("__syncthreads()");
  }
  for (int index = 0; index < 3; index++) results[index] = block->results[index];
}

extern "C" int emu_run(Launch* launch, void (*entry)(const void*), const void* arguments, unsigned bytes) {
  if (launch->shared_bytes > SHARED_BYTES || launch->num_threads > 1024 || launch->num_threads == 0) {
    snprintf(launch->error, ERROR_BYTES, "%s: %u bytes of shared memory and %u threads are no block that a GPU runs",
             launch->kernel, launch->shared_bytes, launch->num_threads);
    return 1;
  }
  unsigned num_blocks = launch->grid[0] * launch->grid[1] * launch->grid[2];
  std::atomic<unsigned> next{0};
  std::atomic<bool> failed{false};
  std::mutex mutex;
  const Shadows shadows = open_shadows(*launch);
  auto work = [&] {
    Block& mine = own_block;
    mine.launch = launch;
    mine.shadows = shadows.data();
    mine.entry = entry;
    mine.arguments = arguments;
    mine.arguments_bytes = bytes;
    for (unsigned number; !failed && (number = next++) < num_blocks;) {
      run_block(mine, number);
      if (mine.error.empty()) continue;
      std::lock_guard<std::mutex> lock(mutex);
      if (failed.exchange(true)) break;
      snprintf(launch->error, ERROR_BYTES, "%s", mine.error.c_str());
      launch->site = mine.site;
    }
  };
  std::vector<std::thread> threads;
  for (unsigned index = 1; index < std::min(launch->num_os_threads, num_blocks / 4); index++) threads.emplace_back([&] {
    work();
    if (own_block.shared) {
      free(own_block.shared - GUARD_BYTES);
      free(own_block.cells);
      munmap(own_block.stacks, own_block.stack_bytes);
    }
  });
  work();
  for (std::thread& thread : threads) thread.join();
  close_shadows(*launch, shadows);
  return failed;
}

}  // namespace emu
