// Slices by cp.async.bulk, from sm_90 on: one lane starts the copy of a whole slice, and all wait at an mbarrier.
//
// It spares the other lanes' instructions and address registers. Whole slices are copied; the rows behind the end of a request
// the warp clears when the copy is there: nothing is copied to that stage any more.
#pragma once
#include "slices.cuh"

struct SliceBarriers {
  uint64_t keys_copied[NUM_WARPS][DECODE_STAGES];
  uint64_t values_copied[NUM_WARPS][DECODE_STAGES];
};

struct Slices : ItemSlices {
  SliceBarriers& barriers;

  DEVICE Slices(const Arguments& all, const Item& one, SliceBuffers& memory, SliceBarriers& made)
      : ItemSlices(all, one, memory), barriers(made) {
    if (lane_index() == 0) {
#pragma unroll
      for (int stage = 0; stage < DECODE_STAGES; stage++) {
        mbarrier_init(&barriers.keys_copied[warp_index()][stage], 1);
        mbarrier_init(&barriers.values_copied[warp_index()][stage], 1);
      }
      mbarrier_init_fence();
    }  // the other lanes wait for the queries before they wait at these
  }

  // A warp's own next slice into a stage that all of its lanes are done with; nothing beyond the item's end.
  DEVICE void start(int stage, int slice, int block) const {
    if (lane_index() != 0 || num_rows(slice) <= 0) return;
    const int warp = warp_index();
    uint64_t *keys = &barriers.keys_copied[warp][stage], *values = &barriers.values_copied[warp][stage];
    mbarrier_arrive_expect(keys, SLICE_BYTES);
    bulk_copy(buffers.keys[warp][stage], arguments.keys + offset(slice, block), SLICE_BYTES, keys);
    mbarrier_arrive_expect(values, SLICE_BYTES);
    bulk_copy(buffers.values[warp][stage], arguments.values + offset(slice, block), SLICE_BYTES, values);
  }
  DEVICE void await_queries() const { cp_async_wait<0>(); }
  DEVICE const uint8_t* await_keys(int stage, int slice) const {
    return await(&barriers.keys_copied[warp_index()][stage], buffers.keys[warp_index()][stage], slice);
  }
  DEVICE const uint8_t* await_values(int stage, int slice) const {
    return await(&barriers.values_copied[warp_index()][stage], buffers.values[warp_index()][stage], slice);
  }

 private:
  DEVICE const uint8_t* await(uint64_t* barrier, uint8_t* rows, int slice) const {
    mbarrier_wait(barrier, slice / NUM_WARPS / DECODE_STAGES & 1);  // how often the stage has been used before
    if (num_rows(slice) < SLICE) {
      for (int i = num_rows(slice) * CHUNKS + lane_index(); i < SLICE * CHUNKS; i += 32)
        store_16B(rows + KvRows::offset(i / CHUNKS, i % CHUNKS), {0, 0, 0, 0});
      __syncwarp();
    }
    return rows;
  }
};
