// The slices of a decode's warps: buffers for DECODE_STAGES of each warp's, and which tokens they hold.
//
// How they are copied is in slices_async.cuh and slices_bulk.cuh, which define the same `Slices`.
#pragma once
#include "attention.cuh"

struct SliceBuffers {
  uint8_t keys[NUM_WARPS][DECODE_STAGES][SLICE_BYTES];
  uint8_t values[NUM_WARPS][DECODE_STAGES][SLICE_BYTES];
};

struct ItemSlices {
  const Arguments& arguments;
  const Item& item;
  const int32_t* table;
  SliceBuffers& buffers;

  DEVICE ItemSlices(const Arguments& all, const Item& one, SliceBuffers& memory)
      : arguments(all), item(one), table(all.block_table + static_cast<int64_t>(one.request) * all.table_stride),
        buffers(memory) {}

  DEVICE int first_token(int slice) const { return item.kv_begin + slice * SLICE; }
  DEVICE int block(int slice) const {
    return first_token(slice) < item.kv_end ? table[first_token(slice) / BLOCK_SIZE] : 0;
  }
  // Byte offset of a slice, which lies in that block.
  DEVICE int64_t offset(int slice, int block) const {
    return row_offset(block, item.kv_head, arguments.num_kv_heads, first_token(slice) % BLOCK_SIZE);
  }
  DEVICE int num_rows(int slice) const { return item.kv_end - first_token(slice); }  // may be more than a slice has
};
