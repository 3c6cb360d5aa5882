// Rows in memory as atoms of eight rows by 128 bytes (64 or 32 where these do not divide a row), which follow each other along
// the eight rows, then on to the next eight.
//
// Within an atom, chunks of 16 bytes are swizzled: chunk c of row r stands at place c XOR r (for atoms of 64 bytes XOR r / 2, of
// 32 bytes XOR r / 4). So the eight rows that ldmatrix reads at one c lie in eight different groups of four banks; and it is the
// swizzle of wgmma's matrix descriptors (PTX ISA, "Shared Memory Matrix Layout").
//
//   an atom of 128 bytes   place 0   1   2   3   4   5   6   7          rows of 256 bytes
//   row 0                        c0  c1  c2  c3  c4  c5  c6  c7         rows 0-7    atom 0 | atom 1
//   row 1                        c1  c0  c3  c2  c5  c4  c7  c6         rows 8-15   atom 2 | atom 3
//   row 2                        c2  c3  c0  c1  c6  c7  c4  c5   ...
#pragma once
#include "device.cuh"

// Rows of `BYTES`, a multiple of 32. Memory begins at a multiple of 1,024 bytes.
template <int ROW_BYTES_>
struct Tiled {
  static constexpr int BYTES = ROW_BYTES_;
  static_assert(BYTES % 32 == 0, "a row is made of whole atoms");
  static constexpr int WIDTH = BYTES % 128 == 0 ? 128 : BYTES % 64 == 0 ? 64 : 32;  // bytes of an atom's row
  static constexpr int ATOM_BYTES = 8 * WIDTH;
  static constexpr int EIGHT_BYTES = 8 * BYTES;  // of eight rows
  static constexpr int ATOM_CHUNKS = WIDTH / 16;

  // Byte offset of chunk c + odd of row r; c is even, odd 0 or 1. With a constant c, little depends on it.
  DEVICE static int offset(int r, int c, int odd) {
    const int row = r & 7, swizzle = (row * ATOM_CHUNKS / 8 ^ odd) * 16;
    return (r >> 3) * EIGHT_BYTES + c / ATOM_CHUNKS * ATOM_BYTES + row * WIDTH + (c % ATOM_CHUNKS * 16 ^ swizzle);
  }
  DEVICE static int offset(int r, int c) { return offset(r, c & ~1, c & 1); }

  // The row of the i-th chunk in memory.
  DEVICE static int row_of(int i) { return i / (EIGHT_BYTES / 16) * 8 + i / ATOM_CHUNKS % 8; }
};
