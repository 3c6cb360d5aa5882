"""The emulation catches what a GPU would let pass: each kernel here does one thing wrong."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from evenhand_kernels.cuda.source import SOURCE_DIR, Variant
from evenhand_kernels.device import CompileError
from evenhand_kernels.emulation.device import EmulatedDevice, EmulationError

SOURCE = """
#include "device.cuh"

struct Arguments {
  const float* from;  // [64]
  float* to;          // [64]
  int32_t number;
};

struct Shared {
  float x[64];
  uint64_t barrier;
};

KERNEL(wrong) {
  SHARED(Shared, shared);
  const int thread = threadIdx.x, other = (thread + 32) % 64;
  BODY
}
"""

CORRECT = """
  shared.x[thread] = arguments.from[thread];
  __syncthreads();
  arguments.to[thread] = shared.x[other] + arguments.number;
"""

WRONG = {
    "a dropped barrier": (
        "shared.x[thread] = arguments.from[thread]; arguments.to[thread] = shared.x[other];",
        r"wrong.cu:\d+: wrong: block \(0, 0, 0\), thread \d+: race: reads 4 bytes .* of shared memory|nobody has written",
    ),
    "a write after a read": (
        "shared.x[thread] = 0.f; __syncthreads(); float y = shared.x[other]; shared.x[thread] = y + 1.f;",
        "race: (reads|writes) 4 bytes at byte .* of shared memory that thread .* (reads|writes), without a barrier between",
    ),
    "two writers": ("shared.x[thread % 32] = 1.f;", "race: writes 4 bytes .* of shared memory that thread"),
    "two writers of global memory": ("arguments.to[thread % 32] = 1.f;", "race: writes 4 bytes at byte .* of to that"),
    "two blocks write one address": ("arguments.to[thread] = 1.f;", r"of to that thread \d+ of block"),
    "uninitialised shared memory": ("arguments.to[thread] = shared.x[thread];", "reads byte .* nobody has written"),
    "global memory beyond the end": (
        "arguments.to[thread + 1] = 0.f;",
        "writes 4 bytes at byte 256 of to, which has 256",
    ),
    "global memory before the start": (
        "if (thread == 0) arguments.to[0] = arguments.from[arguments.number - 8];",
        "reads 4 bytes at byte -4 of from, which has 256",
    ),
    "shared memory beyond the end": (
        "shared.x[thread + 64] = 0.f;",
        r"bytes at byte \d+ of shared memory, which has 264",
    ),
    "a write to const": ("const_cast<float*>(arguments.from)[thread] = 0.f;", "writes from, which is const"),
    "a misaligned vector": ("load_16B(arguments.from + 1);", r"wrong.cu:\d+: .*misaligned: reads 16 bytes at"),
    "a divergent barrier": ("if (thread < 40) __syncthreads(); else __syncwarp();", "waits for ever at|while lanes"),
    "a divergent shuffle": (
        "if (thread % 2) __shfl_xor_sync(ALL_LANES, 1.f, 2); else __syncwarp();",
        "with lanes ffffffff, while lanes .* of its warp are at",
    ),
    "a barrier that some never reach": (
        "if (thread == 0) mbarrier_init(&shared.barrier, 2); __syncthreads();"
        "if (thread == 0) mbarrier_arrive(&shared.barrier); mbarrier_wait(&shared.barrier, 0);",
        "waits for ever at an mbarrier",
    ),
    "an early read of an asynchronous copy": (
        "if (thread == 0) { cp_async_16B(shared.x, arguments.from); cp_async_commit(); cp_async_wait<1>(); arguments.to[0] = shared.x[0]; }",
        "asynchronous copy of thread 0 may still be writing",
    ),
    "a copy that others do not wait for": (
        "if (thread == 0) { cp_async_16B(shared.x, arguments.from); cp_async_commit(); cp_async_wait<0>(); } else if (thread == 63) arguments.to[0] = shared.x[0];",
        "race: reads|nobody has written",
    ),
    "an early read of a bulk copy": (
        "if (thread == 0) mbarrier_init(&shared.barrier, 1); __syncthreads();"
        "if (thread == 0) { mbarrier_arrive_expect(&shared.barrier, 256); bulk_copy(shared.x, arguments.from, 256, &shared.barrier); }"
        "arguments.to[thread] = shared.x[thread];",
        "asynchronous copy of an asynchronous operation may still|nobody has written",
    ),
    "a bulk copy over what is being read": (
        "if (thread == 0) mbarrier_init(&shared.barrier, 1); shared.x[thread] = 1.f; __syncthreads(); arguments.to[thread] = shared.x[other];"
        "if (thread == 0) { mbarrier_arrive_expect(&shared.barrier, 256); bulk_copy(shared.x, arguments.from, 256, &shared.barrier); }"
        "mbarrier_wait(&shared.barrier, 0);",
        "race: writes 256 bytes|asynchronous copy",
    ),
    "an mbarrier used before it is made": (
        "mbarrier_arrive(&shared.barrier);",
        "nobody has written|no mbarrier|where no",
    ),
    "ended lanes at a product": (
        "if (thread == 5) return; float d[4] = {}; mma_m16n8k16(d, {0, 0, 0, 0}, 0, 0); arguments.to[thread] = d[0];",
        "mma.sync needs all lanes",
    ),
    "a shuffle from a lane that takes no part": (
        "if (thread < 4) __shfl_sync(0xfu, 1.f, 9);",
        "a shuffle reads from lane 9, which takes no part",
    ),
}


def run(
    make_device: Callable[..., EmulatedDevice], directory: Path, body: str, *, blocks: int = 1, seed: int = 0
) -> torch.Tensor:
    (directory / "wrong.cu").write_text(SOURCE.replace("BODY", body))
    (directory / "device.cuh").write_text((SOURCE_DIR / "device.cuh").read_text())
    launch = make_device(seed=seed, source_dir=directory).load(
        Variant("wrong", (("BF16", None),), 64, shared_bytes=264)
    )
    to = torch.full((64,), torch.nan)
    launch(blocks, **{"from": torch.arange(64.0)}, to=to, number=7)
    return to


@pytest.mark.parametrize("seed", range(4))
def test_a_correct_kernel_passes(make_device: Callable[..., EmulatedDevice], tmp_path: Path, seed: int) -> None:
    expected = torch.arange(64.0).roll(32) + 7
    assert torch.equal(run(make_device, tmp_path, CORRECT, seed=seed), expected)


@pytest.mark.parametrize("name", WRONG)
def test_what_is_caught(make_device: Callable[..., EmulatedDevice], tmp_path: Path, name: str) -> None:
    body, message = WRONG[name]
    for seed in (0, 1, 2):
        with pytest.raises(EmulationError, match=message):
            run(make_device, tmp_path, body, blocks=8 if "blocks" in name else 1, seed=seed)
    (tmp_path / "correct").mkdir()
    run(make_device, tmp_path / "correct", CORRECT)  # a launch that failed leaves nothing behind


def test_a_kernel_that_does_not_compile(make_device: Callable[..., EmulatedDevice], tmp_path: Path) -> None:
    with pytest.raises(CompileError, match=r"wrong.cu:\d+.*error.*nothing_of_the_kind"):
        run(make_device, tmp_path, "nothing_of_the_kind();")


def test_arguments_are_checked(make_device: Callable[..., EmulatedDevice], tmp_path: Path) -> None:
    run(make_device, tmp_path, CORRECT)
    launch = make_device(source_dir=tmp_path).load(Variant("wrong", (("BF16", None),), 64, shared_bytes=264))
    x = torch.zeros(64)
    with pytest.raises(KeyError, match="number"):
        launch(1, **{"from": x}, to=x)
    with pytest.raises(TypeError, match="no argument more"):
        launch(1, **{"from": x}, to=x, number=0, more=1)
    launch = make_device(source_dir=tmp_path).load(Variant("wrong", (("BF16", None),), 64, shared_bytes=100))
    with pytest.raises(EmulationError, match="lays out 264 bytes of shared memory, launched with 100"):
        launch(1, **{"from": x}, to=x, number=0)
