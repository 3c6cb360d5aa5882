// Slices by cp.async: every lane copies 16 bytes at a time, and waits for its own copies.
#pragma once
#include "slices.cuh"

struct SliceBarriers {};  // none; as a base it takes no memory

struct Slices : ItemSlices {
  DEVICE Slices(const Arguments& all, const Item& one, SliceBuffers& memory, SliceBarriers&)
      : ItemSlices(all, one, memory) {}

  // A warp's own next slice into a stage that all of its lanes are done with; nothing beyond the item's end.
  DEVICE void start(int stage, int slice, int block) const {
    const int warp = warp_index(), rows = num_rows(slice);
    if (rows > 0) copy_rows<SLICE>(buffers.keys[warp][stage], arguments.keys + offset(slice, block), rows);
    cp_async_commit();
    if (rows > 0) copy_rows<SLICE>(buffers.values[warp][stage], arguments.values + offset(slice, block), rows);
    cp_async_commit();
  }
  // The queries, which were the first to be committed.
  DEVICE void await_queries() const { cp_async_wait<2 * (DECODE_STAGES - 1)>(); }
  DEVICE const uint8_t* await_keys(int stage, int) const {
    cp_async_wait<2 * (DECODE_STAGES - 1) + 1>();
    __syncwarp();  // those of all lanes are there
    return buffers.keys[warp_index()][stage];
  }
  DEVICE const uint8_t* await_values(int stage, int) const {
    cp_async_wait<2 * (DECODE_STAGES - 1)>();
    __syncwarp();
    return buffers.values[warp_index()][stage];
  }
};
