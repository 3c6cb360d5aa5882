// ldmatrix, mma.sync and cp.async: what a warp does together, and what a thread has in flight.
#include <cstring>

#include "block.h"
#include "numbers.h"

namespace emu {

struct Words {
  uint32_t x[4];
};

struct Floats {
  float x[4];
};

namespace {

struct Load {
  const uint16_t* row;
  Words result;
};

struct Multiply {
  Floats d;
  Words a;
  uint32_t b[2];
};

// PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type": lane 4 g + t holds of A the rows g and g + 8 at
// columns 2 t, 2 t + 1 and 8 later, of B the column g at these rows, of C the rows g and g + 8 at columns 2 t, 2 t + 1.
template <float (*number)(uint16_t)>
void multiply(Meeting& meeting) {
  alignas(64) float a[16][16], b[16][8], c[16][8];
  for (unsigned lane = 0; lane < WARP; lane++) {
    auto* one = static_cast<Multiply*>(meeting.argument[lane]);
    unsigned g = lane / 4, t = lane % 4 * 2;
    for (unsigned half = 0; half < 2; half++) {
      for (unsigned word = 0; word < 4; word++)
        a[g + word % 2 * 8][t + word / 2 * 8 + half] = number(static_cast<uint16_t>(one->a.x[word] >> 16 * half));
      for (unsigned word = 0; word < 2; word++)
        b[t + word * 8 + half][g] = number(static_cast<uint16_t>(one->b[word] >> 16 * half));
      for (unsigned row = 0; row < 2; row++) c[g + row * 8][t + half] = one->d.x[row * 2 + half];
    }
  }
  for (int i = 0; i < 16; i++)
    for (int k = 0; k < 16; k++)
      for (int j = 0; j < 8; j++) c[i][j] += a[i][k] * b[k][j];
  for (unsigned lane = 0; lane < WARP; lane++) {
    auto* one = static_cast<Multiply*>(meeting.argument[lane]);
    unsigned g = lane / 4, t = lane % 4 * 2;
    one->d = {c[g][t], c[g][t + 1], c[g + 8][t], c[g + 8][t + 1]};
  }
}

void require_whole_warp(const char* what) {
  if (fiber->warp->alive != ~0u) fail("%s needs all lanes of its warp, of which some have ended", what);
}

}  // namespace

extern "C" Floats emu_mma(int is_bf16, Floats d, Words a, uint32_t b0, uint32_t b1) {
  EMU_SITE();
  require_whole_warp("mma.sync");
  Multiply mine{d, a, {b0, b1}};
  meet_in_warp("mma.sync", ~0u, &mine, is_bf16 ? multiply<from_bf16> : multiply<from_fp16>);
  return mine.d;
}

// Each lane gives the address of a row of 16 bytes: lane 8 m + r that of row r of matrix m.
extern "C" Words emu_ldmatrix(const void* row, int transposed) {
  EMU_SITE();
  require_whole_warp("ldmatrix");
  uint32_t offset = shared_offset(row, 16, "ldmatrix reads");
  if (offset % 16) fail("misaligned: ldmatrix reads 16 bytes at byte %u of shared memory", offset);
  access_shared(offset, 16, Access::read);
  Load mine{static_cast<const uint16_t*>(row), {}};
  auto work = [transposed](Meeting& meeting) {
    for (unsigned matrix = 0; matrix < 4; matrix++)
      for (unsigned lane = 0; lane < WARP; lane++) {
        auto at = [&](unsigned i, unsigned j) -> uint32_t {
          return static_cast<Load*>(meeting.argument[matrix * 8 + i])->row[j];
        };
        unsigned g = lane / 4, t = lane % 4 * 2;
        static_cast<Load*>(meeting.argument[lane])->result.x[matrix] =
            transposed ? at(t, g) | at(t + 1, g) << 16 : at(g, t) | at(g, t + 1) << 16;
      }
  };
  meet_in_warp(transposed ? "ldmatrix.trans" : "ldmatrix", ~0u, &mine, work);
  return mine.result;
}

// ---------------------------------------------------------------------------------------------------- cp.async

// The data land as late as they may, when the thread waits; until then nobody may look at their place.
extern "C" void emu_cp_async(void* to, const void* from, unsigned bytes) {
  EMU_SITE();
  uint32_t offset = shared_offset(to, 16, "cp.async writes");
  if (offset % 16 || reinterpret_cast<uintptr_t>(from) % 16)
    fail("misaligned: cp.async of 16 bytes from %p to byte %u of shared memory", from, offset);
  if (bytes) access_global(from, bytes, Access::read);
  access_shared(offset, 16, Access::write);
  memset(to, 0xFF, 16);
  if (block->launch->checked) mark_written(offset, 16, fiber->id, fiber->clock, true);
  fiber->copies.push_back({static_cast<char*>(to), static_cast<const char*>(from), bytes, 16 - bytes});
}

extern "C" void emu_cp_async_commit() { fiber->groups.push_back(static_cast<unsigned>(fiber->copies.size())); }

extern "C" void emu_cp_async_wait(unsigned may_be_in_flight) {
  EMU_SITE();
  auto& groups = fiber->groups;
  if (groups.size() <= may_be_in_flight) return;
  size_t done_groups = groups.size() - may_be_in_flight;
  unsigned done = groups[done_groups - 1];
  for (unsigned index = 0; index < done; index++) {
    const Copy& copy = fiber->copies[index];
    memcpy(copy.to, copy.from, copy.bytes);
    memset(copy.to + copy.bytes, 0, copy.zeros);
    if (block->launch->checked)
      mark_written(static_cast<uint32_t>(copy.to - block->shared), 16, fiber->id, fiber->clock, false);
  }
  fiber->copies.erase(fiber->copies.begin(), fiber->copies.begin() + done);
  groups.erase(groups.begin(), groups.begin() + done_groups);
  for (unsigned& group : groups) group -= done;
}

extern "C" float emu_from_bf16(uint16_t bits) { return from_bf16(bits); }
extern "C" float emu_from_fp16(uint16_t bits) { return from_fp16(bits); }
extern "C" uint16_t emu_to_bf16(float value) { return to_bf16(value); }
extern "C" uint16_t emu_to_fp16(float value) { return to_fp16(value); }

extern "C" unsigned emu_thread_index() { return fiber->id; }
extern "C" unsigned emu_block_index(int axis) { return block->index[axis]; }
extern "C" unsigned emu_grid_size(int axis) { return block->launch->grid[axis]; }
extern "C" void* emu_shared(unsigned bytes) {
  EMU_SITE();
  if (bytes > block->launch->shared_bytes)
    fail("lays out %u bytes of shared memory, launched with %u", bytes, block->launch->shared_bytes);
  return block->shared;
}
extern "C" uint32_t emu_shared_address(const void* address) {
  EMU_SITE();
  return shared_offset(address, 0, "takes the address of");
}
extern "C" void emu_trap() {
  EMU_SITE();
  fail("__trap()");
}

}  // namespace emu
