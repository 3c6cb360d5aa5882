// How Python asks for a launch; the same structures stand in device.py.
#pragma once
#include <cstdint>

namespace emu {

struct Buffer {
  const char* name;
  char* begin;
  uint64_t bytes;
  int32_t writable;
  int32_t unused;
};

struct Launch {
  const char* kernel;
  const Buffer* buffers;  // all memory that the kernel may touch beside its shared memory
  uint64_t seed;          // 0: threads take turns in order; else in a random order
  uint64_t site;          // out: the place in the kernel's library that the error is about, or 0
  char* error;            // out: ERROR_BYTES for a message
  uint32_t grid[3];
  uint32_t num_threads;   // of a block
  uint32_t shared_bytes;
  uint32_t num_buffers;
  int32_t checked;        // 0: the kernel was compiled without calls of the checks
  uint32_t num_os_threads;
};

constexpr uint32_t ERROR_BYTES = 1024;

// Runs all blocks; 0, or 1 with an error. `entry` is the kernel, called once for each CUDA thread with a copy of its
// arguments, `bytes` of them.
extern "C" int emu_run(Launch* launch, void (*entry)(const void*), const void* arguments, unsigned bytes);

}  // namespace emu
