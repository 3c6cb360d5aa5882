// wgmma: products of a warpgroup, which are computed while its threads go on.
//
// As late as they may: when a thread waits for their group. Until then the registers of the sum hold NaN, the left operand's are
// remembered and must not change, and what the descriptors name counts as read by the warpgroup's engine, so that a write to it
// is a race. When a product starts, what it will read must be there and visible to the asynchronous proxy.
#include <algorithm>
#include <cstring>

#include "block.h"
#include "numbers.h"

namespace emu {

constexpr unsigned ROWS = 64, STEP = 16;

namespace {

// A matrix in shared memory by its descriptor: PTX ISA, "Matrix Descriptor Format" and "Canonical Layouts".
struct Matrix {
  uint32_t start, leading, stride;
  unsigned width;  // bytes of a row of the swizzle's atom; 16: no swizzle
  bool across;     // numbers of one k are neighbours, not those of one row (or column) i

  Matrix(uint64_t descriptor, bool across_rows) : across(across_rows) {
    constexpr unsigned WIDTHS[] = {16, 128, 64, 32};
    auto field = [&](unsigned shift) { return static_cast<uint32_t>(descriptor >> shift & 0x3fff) << 4; };
    start = field(0), leading = field(16), stride = field(32), width = WIDTHS[descriptor >> 62];
    if (descriptor & 0x3fffc000c000c000) fail("a matrix descriptor with other bits than it has fields: %016lx", descriptor);
  }

  uint32_t address(unsigned i, unsigned k) const {
    unsigned step = width / 2, offset;
    if (width == 16)
      offset = across ? i % 8 * 2 + i / 8 * stride + k % 8 * 16 + k / 8 * leading
                      : i % 8 * 16 + i / 8 * stride + k % 8 * 2 + k / 8 * leading;
    else
      offset = across ? i % step * 2 + i / step * leading + k % 8 * width + k / 8 * stride
                      : i % 8 * width + i / 8 * stride + k * 2;
    uint32_t plain = start + offset;
    return plain ^ (plain >> 7 & (width / 16 - 1)) << 4;
  }

  // `visit(address)` for each 16 bytes of `count` rows (or columns).
  template <class Visit>
  void for_each_chunk(unsigned count, Visit visit) const {
    for (unsigned i = 0; i < count; i += across ? 8 : 1)
      for (unsigned k = 0; k < STEP; k += across ? 1 : 8) visit(address(i, k));
  }

  uint16_t at(unsigned i, unsigned k) const {
    uint16_t bits;
    memcpy(&bits, block->shared + address(i, k), 2);
    return bits;
  }
};

// What a thread brings to a product.
struct Start {
  int is_bf16;
  unsigned columns;
  float* d;
  uint64_t a;
  const uint32_t* a_registers;
  uint64_t b;
  int b_across, add;
};

bool same(const Start& one, const Start& other) {
  return one.is_bf16 == other.is_bf16 && one.columns == other.columns && one.a == other.a && one.b == other.b &&
         one.b_across == other.b_across && one.add == other.add && !one.a_registers == !other.a_registers;
}

struct Term {
  uint64_t a, b;
  bool b_across;
  const uint32_t* registers[WARPGROUP];  // of the left operand, or null
  uint32_t words[WARPGROUP][4];          // what was in them
};

unsigned warpgroup_index() { return fiber->id / WARPGROUP; }
Warpgroup& warpgroup() { return block->warpgroups[warpgroup_index()]; }
Fiber& member(unsigned index) { return block->fibers[warpgroup_index() * WARPGROUP + index]; }

// Row and column of a thread's number `index` of a sum, or of its left operand (with 16 columns): lane 4 g + t of warp w has rows
// 16 w + g and 8 later at columns 2 t, 2 t + 1 of every eight.
unsigned row_of(unsigned thread, unsigned index) { return thread / WARP * 16 + thread % WARP / 4 + index / 2 % 2 * 8; }
unsigned column_of(unsigned thread, unsigned index) { return index / 4 * 8 + thread % 4 * 2 + index % 2; }

}  // namespace

// Products into the same registers, one after the other.
struct Product {
  unsigned group, columns;
  float (*number)(uint16_t);
  float* d[WARPGROUP];
  bool computed = false;
  unsigned finished = 0;  // threads that have waited for it
  std::vector<Term> terms;
  std::vector<float> sum;  // [ROWS][columns]

  bool holds(unsigned thread, const void* registers, unsigned bytes) const {
    auto* begin = static_cast<const char*>(registers);
    auto* mine = reinterpret_cast<const char*>(d[thread]);
    if (begin < mine + columns / 2 * sizeof(float) && mine < begin + bytes) return true;
    for (const Term& term : terms) {
      auto* left = reinterpret_cast<const char*>(term.registers[thread]);
      if (left && begin < left + sizeof term.words[0] && left < begin + bytes) return true;
    }
    return false;
  }

  void compute() {
    if (computed) return;
    computed = true;
    std::vector<float> right(STEP * columns);
    for (const Term& term : terms) {
      float left[ROWS][STEP];
      Matrix a(term.a, false), b(term.b, term.b_across);
      for (unsigned i = 0; i < ROWS && !term.registers[0]; i++)
        for (unsigned k = 0; k < STEP; k++) left[i][k] = number(a.at(i, k));
      for (unsigned thread = 0; thread < WARPGROUP && term.registers[0]; thread++)
        for (unsigned index = 0; index < 8; index++)
          left[row_of(thread, index)][column_of(thread, index)] =
              number(static_cast<uint16_t>(term.words[thread][index / 2] >> index % 2 * 16));
      for (unsigned k = 0; k < STEP; k++)
        for (unsigned j = 0; j < columns; j++) right[k * columns + j] = number(b.at(j, k));
      for (unsigned i = 0; i < ROWS; i++)
        for (unsigned k = 0; k < STEP; k++)
          for (unsigned j = 0; j < columns; j++) sum[i * columns + j] += left[i][k] * right[k * columns + j];
    }
  }

  // A thread has waited: it gets its numbers.
  void finish(unsigned thread) const {
    for (const Term& term : terms)
      if (term.registers[thread] && memcmp(term.registers[thread], term.words[thread], sizeof term.words[thread]))
        fail("has changed registers that a product in flight reads");
    for (unsigned index = 0; index < columns / 2; index++)
      d[thread][index] = sum[row_of(thread, index) * columns + column_of(thread, index)];
  }
};

namespace {

// The clocks that all threads of the warpgroup have seen: what is ordered before a product that they start now.
Clocks seen_by_all() {
  Clocks seen(member(0).seen, member(0).seen + block->num_clocks);
  for (unsigned thread = 1; thread < WARPGROUP; thread++)
    if (member(thread).seen != member(thread - 1).seen)
      for (unsigned index = 0; index < block->num_clocks; index++) seen[index] = std::min(seen[index], member(thread).seen[index]);
  return seen;
}

void read(uint32_t offset, const Clocks& seen, Clock clock) {
  shared_offset(block->shared + offset, 16, "wgmma reads");
  if (!block->launch->checked) return;
  for (uint32_t index = offset / 4; index < offset / 4 + 4; index++) {
    const Cell& cell = block->cells[index];
    if (!touched(cell.write_clock)) fail("wgmma reads byte %u of shared memory, which nobody has written", index * 4);
    if (cell.pending) fail("wgmma reads byte %u of shared memory, which an asynchronous copy may still be writing", index * 4);
    Clock visible = cell.write_clock;
    if (cell.writer < block->num_threads) {
      const auto& fences = block->fibers[cell.writer].fences;
      auto fence = std::lower_bound(fences.begin(), fences.end(), cell.write_clock);
      if (fence == fences.end())
        fail("wgmma reads byte %u of shared memory that thread %u has written, without fence.proxy.async after it", index * 4,
             cell.writer);
      visible = *fence;
    }
    if (visible > seen[cell.writer])
      fail("race: wgmma reads byte %u of shared memory that %s %u has written, without a barrier between", index * 4,
           cell.writer < block->num_threads ? "thread" : "engine", cell.writer);
  }
  mark_read(offset, 16, product_reader(warpgroup_index()), clock);
}

// Whether the thread has made sure that these registers are as they must be.
void require_fence(const void* registers, unsigned bytes, const char* what) {
  auto* begin = static_cast<const char*>(registers);
  for (const Registers& one : fiber->fenced) {
    auto* fenced = static_cast<const char*>(one.begin);
    if (begin < fenced || begin + bytes > fenced + one.words.size() * 4) continue;
    if (memcmp(begin, reinterpret_cast<const char*>(one.words.data()) + (begin - fenced), bytes))
      fail("has changed %s between wgmma.fence and wgmma.mma_async", what);
    return;
  }
  fail("starts a product with %s, which the wgmma.fence before it does not name", what);
}

// The product in flight into these registers of a thread.
Product* find(unsigned thread, const float* d) {
  for (auto& product : warpgroup().products)
    if (product->group >= member(thread).awaited_groups && product->d[thread] == d) return product.get();
  return nullptr;
}

void start_together(void* const (&arguments)[WARPGROUP]) {
  const Start& first = *static_cast<const Start*>(arguments[0]);
  for (void* argument : arguments)
    if (!same(first, *static_cast<const Start*>(argument))) fail("threads of a warpgroup start different products");
  const unsigned columns = first.columns, group = fiber->committed_groups;
  if (columns % 8 || columns > 256) fail("wgmma with %u columns", columns);
  const Clocks seen = seen_by_all();
  const Clock clock = block->first + group;
  auto visit = [&](uint32_t offset) { read(offset, seen, clock); };
  if (!first.a_registers) Matrix(first.a, false).for_each_chunk(ROWS, visit);
  Matrix(first.b, first.b_across).for_each_chunk(columns, visit);

  Product* product = find(0, first.d);
  if (!product) {
    auto made = std::make_shared<Product>();
    product = made.get();
    product->group = group;
    product->columns = columns;
    product->number = first.is_bf16 ? from_bf16 : from_fp16;
    product->sum.resize(ROWS * columns);
    for (unsigned thread = 0; thread < WARPGROUP; thread++) {
      float* d = product->d[thread] = static_cast<const Start*>(arguments[thread])->d;
      for (unsigned index = 0; index < columns / 2; index++)
        product->sum[row_of(thread, index) * columns + column_of(thread, index)] = first.add ? d[index] : 0.f;
      memset(d, 0xFF, columns / 2 * sizeof(float));
    }
    warpgroup().products.push_back(std::move(made));
  } else if (!first.add) {
    fail("starts a new sum in registers that a product in flight writes");
  }
  Term term{first.a, first.b, first.b_across != 0, {}, {}};
  for (unsigned thread = 0; thread < WARPGROUP; thread++)
    if (const uint32_t* left = static_cast<const Start*>(arguments[thread])->a_registers) {
      term.registers[thread] = left;
      memcpy(term.words[thread], left, sizeof term.words[thread]);
    }
  product->terms.push_back(term);
}

}  // namespace

extern "C" void emu_wgmma(int is_bf16, unsigned columns, float* d, uint64_t a, const uint32_t* a_registers, uint64_t b,
                          int b_across, int add) {
  EMU_SITE();
  constexpr const char* WHAT = "wgmma.mma_async";
  if ((warpgroup_index() + 1) * WARPGROUP > block->num_threads) fail("%s needs a whole warpgroup of 128 threads", WHAT);
  const Product* open = find(fiber->id % WARPGROUP, d);
  if (!fiber->has_fenced) fail("starts a product without wgmma.fence after it has waited for others");
  if (!open && add) require_fence(d, columns / 2 * sizeof(float), "the registers of its sum");
  if (open && open->group != fiber->committed_groups) fail("starts a product into registers that an earlier group still writes");
  if (a_registers) require_fence(a_registers, 16, "the registers of its left operand");

  Start mine{is_bf16, columns, d, a, a_registers, b, b_across, add};
  Warpgroup& group = warpgroup();
  group.argument[fiber->id % WARPGROUP] = &mine;
  if (++group.arrived < WARPGROUP) return wait_for(WHAT);
  group.arrived = 0;
  start_together(group.argument);
  for (unsigned thread = 0; thread < WARPGROUP; thread++) member(thread).state = State::ready;
  let_others_run();
}

extern "C" void emu_wgmma_fence() {
  EMU_SITE();
  fiber->fenced.clear();
  fiber->has_fenced = true;
}

// Registers that the kernel names at a fence, or after a wait: none that products in flight use.
extern "C" void emu_wgmma_pin(void* registers, unsigned bytes, int before_products) {
  EMU_SITE();
  for (auto& product : warpgroup().products)
    if (product->group >= fiber->awaited_groups && product->holds(fiber->id % WARPGROUP, registers, bytes))
      fail("uses registers of a product in flight");
  if (!before_products) return;
  auto* words = static_cast<const uint32_t*>(registers);
  fiber->fenced.push_back({registers, std::vector<uint32_t>(words, words + bytes / 4)});
}

extern "C" void emu_wgmma_commit() {
  EMU_SITE();
  fiber->committed_groups++;
  warpgroup().num_groups = std::max(warpgroup().num_groups, fiber->committed_groups);
}

extern "C" void emu_wgmma_wait(unsigned may_be_in_flight) {
  EMU_SITE();
  fiber->has_fenced = false;
  fiber->fenced.clear();
  const unsigned first = fiber->awaited_groups;
  if (fiber->committed_groups <= first + may_be_in_flight) return;
  const unsigned end = fiber->awaited_groups = fiber->committed_groups - may_be_in_flight;
  for (auto& product : warpgroup().products)
    if (product->group >= first && product->group < end) {
      product->compute();
      product->finish(fiber->id % WARPGROUP);
      product->finished++;
    }
  std::erase_if(warpgroup().products, [](const auto& product) { return product->finished == WARPGROUP; });
  own_clocks(*fiber)[product_clock(fiber->id / WARP)] = block->first + end - 1;
}

}  // namespace emu
