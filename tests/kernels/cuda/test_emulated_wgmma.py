"""wgmma under the emulation: descriptors mean what the PTX ISA says, and what a GPU would compute wrong in silence is caught."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from evenhand_kernels.cuda.source import SOURCE_DIR, Variant
from evenhand_kernels.emulation.device import EmulatedDevice, EmulationError

MakeDevice = Callable[..., EmulatedDevice]

SOURCE = """
#include "wgmma.cuh"

struct Arguments {
  const Element* left;   // [64, SIZE]
  const Element* right;  // [64, SIZE]
  float* scores;         // [64, 64]: left right^T
  float* sums;           // [64, SIZE]: scores, as elements, right
};

using Row = Tiled<SIZE * 2>;

struct Shared {
  Element left[64 * SIZE];
  Element right[64 * SIZE];
  uint64_t barrier;
};

DEVICE void copy(Element* to, const Element* from) {
  for (int i = threadIdx.x; i < 64 * SIZE / 8; i += 128)
    cp_async_16B(reinterpret_cast<uint8_t*>(to) + Row::offset(i / (SIZE / 8), i % (SIZE / 8)), from + i * 8);
}

template <int N> DEVICE void write(float* to, const float (&d)[N][4]) {
  const int row = warp_index() * 16 + lane_index() / 4, column = lane_index() % 4 * 2;
  for (int n = 0; n < N; n++)
    for (int j = 0; j < 4; j++) to[(row + j / 2 * 8) * N * 8 + n * 8 + column + j % 2] = d[n][j];
}

KERNEL(products) {
  SHARED(Shared, shared);
  if (threadIdx.x == 0) mbarrier_init(&shared.barrier, 1);
  copy(shared.left, arguments.left);
  copy(shared.right, arguments.right);
  cp_async_commit();
  cp_async_wait<0>();
  fence_async();
  __syncthreads();
  const Matrix<Row> left{shared_address(shared.left) / 16}, right{shared_address(shared.right) / 16};
  float scores[8][4], sums[SIZE / 8][4] = {};
  uint32_t weights[4][4];
  wgmma_fence();
  wgmma_keys<false>(scores, left.descriptor(), right.descriptor());
  for (int k = 1; k < SIZE / 16; k++) wgmma_keys<true>(scores, left.along(k).descriptor(), right.along(k).descriptor());
  wgmma_commit();
  wgmma_wait<0>(scores);
  write(arguments.scores, scores);
  for (int n = 0; n < 8; n++) {
    weights[n / 2][n % 2 * 2] = pack(scores[n][0], scores[n][1]);
    weights[n / 2][n % 2 * 2 + 1] = pack(scores[n][2], scores[n][3]);
  }
  wgmma_fence(sums, weights);
  for (int k = 0; k < 4; k++) wgmma_values(sums, weights[k], right.across(k).descriptor());
  wgmma_commit();
  wgmma_wait<0>(sums);
  write(arguments.sums, sums);
}
"""

WRONG = {
    "an early read of a sum": (
        "wgmma_wait<0>(scores);\n  write(arguments.scores, scores);",
        "write(arguments.scores, scores);\n  wgmma_wait<0>(scores);",
        None,
    ),
    "registers that are still in flight": (
        "wgmma_wait<0>(scores);",
        "wgmma_wait<1>(scores);",
        "registers of a product in flight",
    ),
    "no fence": ("wgmma_fence();", "", "starts a product without wgmma.fence after it has waited"),
    "no fence of the second group": (
        "wgmma_fence(sums, weights);",
        "",
        "without wgmma.fence after it has waited for others",
    ),
    "no fence of a sum": (
        "wgmma_fence(sums, weights);",
        "wgmma_fence(weights);",
        "with the registers of its sum, which the wgmma.fence before it does not name",
    ),
    "no fence of the left operand": (
        "wgmma_fence(sums, weights);",
        "wgmma_fence(sums);",
        "with the registers of its left operand, which the wgmma.fence before it does not name",
    ),
    "registers changed after the fence": (
        "wgmma_fence(sums, weights);",
        "wgmma_fence(sums, weights); sums[1][2] += 1.f;",
        "has changed the registers of its sum between wgmma.fence and",
    ),
    "a left operand changed in flight": (
        "wgmma_wait<0>(sums);",
        "weights[3][1] = 7; wgmma_wait<0>(sums);",
        "has changed registers that a product in flight reads",
    ),
    "no proxy fence": ("fence_async();", "", r"thread \d+ has written, without fence.proxy.async after it"),
    "a proxy fence after the barrier": (
        "fence_async();\n  __syncthreads();",
        "__syncthreads();\n  fence_async();",
        "race: wgmma reads byte .* without a barrier between",
    ),
    "a write after the proxy fence": (
        "fence_async();\n  __syncthreads();",
        "fence_async(); __syncthreads(); shared.right[threadIdx.x * 2] = 0, shared.right[threadIdx.x * 2 + 1] = 0; __syncthreads();",
        "without fence.proxy.async after it",
    ),
    "no barrier before a product": (
        "fence_async();\n  __syncthreads();",
        "fence_async();",
        "race: wgmma reads|nobody has|may still",
    ),
    "an operand overwritten in flight": (
        "wgmma_wait<0>(scores);",
        "shared.right[threadIdx.x * 2] = 0; wgmma_wait<0>(scores);",
        "race: writes 2 bytes at byte .* of shared memory that a product of warpgroup 0 reads",
    ),
    "an operand overwritten by a thread while another still waits": (
        "wgmma_wait<0>(scores);",
        "wgmma_wait<0>(scores); shared.left[(threadIdx.x + 64) % 128 * 2] = 0;",
        "race: ",
    ),
    "a copy over an operand in flight": (
        "wgmma_wait<0>(scores);",
        "if (threadIdx.x == 0) { mbarrier_arrive_expect(&shared.barrier, 64);"
        " bulk_copy(shared.right, arguments.right, 64, &shared.barrier); } wgmma_wait<0>(scores);",
        "race: writes 64 bytes at byte .* of shared memory that a product of warpgroup 0 reads",
    ),
    "an operand that is still being copied": (
        "wgmma_fence();",
        "if (threadIdx.x == 0) { mbarrier_arrive_expect(&shared.barrier, 64);"
        " bulk_copy(shared.right, arguments.right, 64, &shared.barrier); } wgmma_fence();",
        "which an asynchronous copy may still be writing",
    ),
    "a stride of its own": (
        "left.descriptor(), right.descriptor()",
        "left.descriptor() + (uint64_t{4} << 32), right.descriptor()",
        None,
    ),
    "another swizzle": (
        "left.descriptor(), right.descriptor()",
        "left.descriptor() & ~(uint64_t{3} << 62), right.descriptor()",
        None,
    ),
    "a matrix beyond shared memory": (
        "right.across(k)",
        "right.across(k + 4)",
        "wgmma reads 16 bytes at byte .* of shared memory, which has|nobody has written",
    ),
    "an offset that overflows its field": (
        "right.descriptor());",
        "right.descriptor() | 1 << 15);",
        "other bits than it has fields",
    ),
    "different descriptors": (
        "left.along(k)",
        "left.along(threadIdx.x < 32 ? k : 0)",
        "threads of a warpgroup start different products",
    ),
    "a warp that takes no part": (
        "wgmma_fence();",
        "if (threadIdx.x / 32 == 2) return; wgmma_fence();",
        "waits for ever at wgmma",
    ),
    "a sum begun anew in flight": (
        "wgmma_keys<true>",
        "wgmma_keys<false>",
        "starts a new sum in registers that a product in flight writes",
    ),
}


def run(
    make_device: MakeDevice,
    directory: Path,
    text: str,
    *,
    row: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> tuple[np.ndarray, ...]:
    """Left, right, scores and sums, in float64; the products as the kernel `text` has computed them."""
    directory.mkdir(exist_ok=True)
    (directory / "products.cu").write_text(text)
    for name in ("device.cuh", "tiled.cuh", "wgmma.cuh"):
        (directory / name).write_text((SOURCE_DIR / name).read_text())
    constants = (*((("BF16", None),) if dtype == torch.bfloat16 else ()), ("SIZE", row))
    variant = Variant("products", constants, 128, shared_bytes=2 * 64 * row * 2 + 8)
    generator = torch.Generator().manual_seed(row)
    left, right = (torch.randn(64, row, generator=generator).to(dtype) for _ in range(2))
    scores, sums = torch.full((64, 64), torch.nan), torch.full((64, row), torch.nan)
    launch = make_device(seed=seed, source_dir=directory).load(variant)
    launch(1, left=left, right=right, scores=scores, sums=sums)
    return tuple(x.double().numpy() for x in (left, right, scores, sums))


def is_right(left: np.ndarray, right: np.ndarray, scores: np.ndarray, sums: np.ndarray, dtype: torch.dtype) -> bool:
    expected = left @ right.T
    weights = torch.from_numpy(expected).to(dtype).double().numpy()
    return np.allclose(scores, expected, atol=1e-3) and np.allclose(sums, weights @ right, atol=0.5, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("row", [16, 32, 64, 80, 96, 128])
def test_products_of_rows_in_atoms(make_device: MakeDevice, tmp_path: Path, row: int, dtype: torch.dtype) -> None:
    """Rows of 32 to 256 bytes: every swizzle, along and across, in one atom and in several."""
    for seed in (0, 1):
        assert is_right(*run(make_device, tmp_path / str(row), SOURCE, row=row, dtype=dtype, seed=seed), dtype)


@pytest.mark.parametrize("name", WRONG)
def test_what_is_caught(make_device: MakeDevice, tmp_path: Path, name: str) -> None:
    """With a message, or, where the kernel does what it may but not what is meant, by its result."""
    old, new, message = WRONG[name]
    assert SOURCE.count(old) == 1
    text = SOURCE.replace(old, new)
    for seed in (0, 1, 2):
        if message is None:
            assert not is_right(*run(make_device, tmp_path, text, seed=seed), torch.bfloat16)
            continue
        with pytest.raises(EmulationError, match=message):
            run(make_device, tmp_path, text, seed=seed)


def test_a_block_of_less_than_a_warpgroup(make_device: MakeDevice, tmp_path: Path) -> None:
    run(make_device, tmp_path, SOURCE)
    variant = Variant("products", (("BF16", None), ("SIZE", 64)), 96, shared_bytes=2 * 64 * 64 * 2 + 8)
    x, y = torch.zeros(64, 64, dtype=torch.bfloat16), torch.zeros(64, 64)
    with pytest.raises(EmulationError, match="needs a whole warpgroup of 128 threads"):
        make_device(source_dir=tmp_path).load(variant)(1, left=x, right=x, scores=y, sums=y.clone())
