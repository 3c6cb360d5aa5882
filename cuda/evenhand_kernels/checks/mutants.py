"""Mutants: kernels with one thing wrong each, as edits of their sources. The cases must catch every one.

They are the mistakes that one makes in such kernels: a barrier or a wait dropped, a bound off by one, an index of the wrong
head, a factor forgotten. A mutant that no case notices shows what the cases do not test.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from evenhand_kernels.checks import attention, elementwise, quantized, sampling
from evenhand_kernels.cuda.source import SOURCE_DIR
from evenhand_kernels.emulation.device import EmulatedDevice, EmulationError

CASES = [*attention.CASES, *elementwise.CASES, *quantized.CASES, *sampling.CASES]


@dataclass(frozen=True, slots=True)
class Mutant:
    """`file` with `old`, which stands there once (or at place `index` of several), replaced by `new`.

    Attributes:
        cases: beginnings of the names of cases to try, in this order.
    """

    file: str
    old: str
    new: str
    cases: tuple[str, ...]
    index: int = 0

    def __str__(self) -> str:
        return f"{self.file}: {self.old.strip()[:60]!r} -> {self.new.strip()[:60]!r}"


def caught_by(mutant: Mutant, cache_dir: Path) -> str | None:
    """What the first case that fails says; None if the mutant survives all of its cases."""
    with _mutated(mutant) as source_dir:
        for case in CASES:
            if not case.small or not case.name.startswith(mutant.cases):
                continue
            for seed in (0, 1, 2):
                try:
                    case.run(EmulatedDevice(cache_dir, seed=seed, source_dir=source_dir))
                except (AssertionError, EmulationError) as error:
                    return f"{case}: {error}"
    return None


@contextmanager
def _mutated(mutant: Mutant) -> Iterator[Path]:
    parts = (SOURCE_DIR / mutant.file).read_text(encoding="utf-8").split(mutant.old)
    assert len(parts) > mutant.index + 1, f"{mutant}: what it replaces is no longer there"
    before, after = mutant.old.join(parts[: mutant.index + 1]), mutant.old.join(parts[mutant.index + 1 :])
    with tempfile.TemporaryDirectory() as directory:
        for path in SOURCE_DIR.glob("*.cu*"):
            shutil.copy(path, directory)
        (Path(directory) / mutant.file).write_text(before + mutant.new + after, encoding="utf-8")
        yield Path(directory)


DECODE = ("attention: decodes at",)
CHUNKS = ("attention: chunks at",)
SPLIT = ("attention: split",)
WINDOW = ("attention: window",)
MIXED = ("attention: decodes beside",)
PADDING = ("attention: a graph",)
FP8 = ("attention: fp8, head size 64, torch.bf",)
BULK = ("attention: bulk copies, decodes", "attention: bulk copies, split")
WGMMA = ("attention: wgmma, chunks", "attention: wgmma, several", "attention: wgmma, the last")
WGMMA_ENDS = ("attention: wgmma, the end of",)
WIDE = ("attention: wgmma, head size 128, torch.bf",)
QUANTIZED = ("quantized_linear", "dequantize")
SAMPLE = ("sample: ties", "sample: vocabulary of 7", "sample: vocabulary of 1000")
ADJUST = ("adjust",)
NORM = ("rms_norm: 3 x",)

MUTANTS = [
    # barriers and waits
    Mutant("decode.cuh", "__syncthreads();  // the queries are there", "", DECODE),
    Mutant("slices_async.cuh", "{ cp_async_wait<2 * (DECODE_STAGES - 1)>(); }", "{}", DECODE),
    Mutant(
        "slices_async.cuh",
        "cp_async_wait<2 * (DECODE_STAGES - 1) + 1>();",
        "cp_async_wait<2 * (DECODE_STAGES - 1) + 2>();",
        DECODE,
    ),
    Mutant("slices_async.cuh", "__syncwarp();  // those of all lanes are there", "", DECODE),
    Mutant("slices_async.cuh", "__syncwarp();\n    return buffers.values", "return buffers.values", DECODE),
    Mutant(
        "decode.cuh",
        "__syncwarp();  // all lanes are done with the stage that is filled now",
        "",
        ("attention: split",),
    ),
    Mutant("slices_async.cuh", "cp_async_wait<2 * (DECODE_STAGES - 1)>();\n    __syncwarp();", "__syncwarp();", DECODE),
    Mutant("decode.cuh", "__syncwarp();  // all lanes are done with the stage that is filled now", "", BULK),
    Mutant("slices_bulk.cuh", "mbarrier_wait(barrier, slice / NUM_WARPS / DECODE_STAGES & 1);", "", BULK),
    Mutant("slices_bulk.cuh", "slice / NUM_WARPS / DECODE_STAGES & 1", "0", BULK),
    Mutant("slices_bulk.cuh", "store_16B(rows + KvRows::offset(i / CHUNKS, i % CHUNKS), {0, 0, 0, 0});", "", BULK),
    Mutant("slices_bulk.cuh", "      __syncwarp();\n    }\n    return rows", "    }\n    return rows", BULK),
    Mutant("slices_bulk.cuh", "if (lane_index() != 0 || num_rows", "if (num_rows", BULK),
    Mutant("slices_bulk.cuh", "if (lane_index() != 0 || num_rows(slice) <= 0)", "if (lane_index() != 0)", BULK),
    Mutant("decode.cuh", "__syncthreads();  // the parts lie where the slices were", "", DECODE),
    Mutant(
        "decode.cuh",
        "  __syncthreads();\n  for (int i = threadIdx.x; i < item.num_rows",
        "  for (int i = threadIdx.x; i < item.num_rows",
        DECODE,
    ),
    Mutant(
        "prompt.cuh", "cp_async_wait<0>();\n    __syncthreads();  // the keys", "__syncthreads();  // the keys", CHUNKS
    ),
    Mutant(
        "prompt.cuh",
        "__syncthreads();  // the keys are there, and nobody needs the values of the tile before",
        "",
        CHUNKS,
    ),
    Mutant(
        "prompt.cuh",
        "cp_async_wait<0>();\n    __syncthreads();  // the values",
        "__syncthreads();  // the values",
        CHUNKS,
    ),
    Mutant("prompt.cuh", "__syncthreads();  // the values are there, and nobody needs the keys", "", CHUNKS),
    Mutant("prompt_wgmma.cuh", "fence_async();\n  __syncthreads();  // the q", "__syncthreads();  // the q", WGMMA),
    Mutant("prompt_wgmma.cuh", "__syncthreads();  // the queries are there", "", WGMMA),
    Mutant("prompt_wgmma.cuh", "__syncthreads();  // the barriers are made", "", WGMMA),
    Mutant(
        "prompt_wgmma.cuh",
        "__syncthreads();  // all warps are done with this tile's keys, and with the values of the one before",
        "",
        WGMMA,
    ),
    Mutant("prompt_wgmma.cuh", "fence_async();\n    __syncthreads();", "__syncthreads();", WGMMA),
    Mutant("prompt_wgmma.cuh", "fence_async();\n    __syncthreads();", "fence_async();", WGMMA),
    Mutant("prompt_wgmma.cuh", "mbarrier_wait(&shared.copied[stage], step / STAGES & 1);", "", WGMMA),
    Mutant("prompt_wgmma.cuh", "step / STAGES & 1", "0", WGMMA),
    Mutant("prompt_wgmma.cuh", "tiles.start(tile + STAGES);", "tiles.start(tile + STAGES + 1);", WGMMA),
    Mutant("prompt_wgmma.cuh", "if (!is_last) wgmma_wait<1>(scores[0]);", "", WGMMA),
    Mutant("prompt_wgmma.cuh", "wgmma_wait<1>(scores[0]);", "wgmma_wait<2>(scores[0]);", WGMMA),
    Mutant("prompt_wgmma.cuh", "  wgmma_wait<0>(scores[0]);", "", WGMMA),
    Mutant("prompt_wgmma.cuh", "if (PARTS > 1) wgmma_wait<0>(a[other].output[0], weights);", "", WGMMA),
    Mutant("prompt_wgmma.cuh", "if (PARTS == 1) wgmma_wait<0>(a[0].output[0], weights);", "", WGMMA),
    Mutant("prompt_wgmma.cuh", "wgmma_wait<0>(a[PARTS - 1].output[0], weights);", "", WGMMA),
    Mutant("prompt_wgmma.cuh", "wgmma_fence(a[part].output[0], weights);", "", WGMMA),
    Mutant("prompt_wgmma.cuh", "wgmma_fence(a[part].output[0], weights);", "wgmma_fence(weights);", WGMMA),
    Mutant("prompt_wgmma.cuh", "wgmma_fence(a[part].output[0], weights);", "wgmma_fence(a[part].output[0]);", WGMMA),
    Mutant("prompt_wgmma.cuh", "  wgmma_fence();\n", "", WGMMA),
    Mutant("prompt_wgmma.cuh", "wgmma_commit();", "", WGMMA),
    Mutant("prompt_wgmma.cuh", "wgmma_commit();", "", WGMMA, index=1),
    Mutant("prompt_wgmma.cuh", "if (part == 0) tiles.await(tile + 1);", "", WGMMA),
    Mutant("rms_norm.cu", "  __syncthreads();\n", "", NORM),
    Mutant(
        "vocabulary.cuh",
        "  __syncthreads();  // whoever reads an earlier result has done so\n",
        "",
        ("log_probabilities",),
    ),
    Mutant("vocabulary.cuh", "  __syncthreads();\n  uint64_t result = 0;", "  uint64_t result = 0;", SAMPLE),
    Mutant("sample.cu", "shared.bins[bin] = 0;\n    __syncthreads();", "shared.bins[bin] = 0;", SAMPLE),
    Mutant("sample.cu", "    __syncthreads();\n    if (warp_index() == 0) {", "    if (warp_index() == 0) {", SAMPLE),
    Mutant("sample.cu", "    __syncthreads();\n    const int64_t digit", "    const int64_t digit", SAMPLE),
    Mutant("count_tokens.cu", "  __syncthreads();\n", "", ADJUST),
    Mutant("adjust.cu", "  __syncthreads();\n", "", ADJUST),
    # bounds
    Mutant("attention.cuh", "KvRows::row_of(chunk) < num_rows", "true", DECODE),
    Mutant(
        "attention.cuh",
        "const bool exists = row < item.num_rows;",
        "const bool exists = row <= item.num_rows;",
        DECODE + MIXED,
    ),
    Mutant("attention_tile.cuh", "behind < 0 ||", "behind < -1 ||", DECODE),
    Mutant("attention_tile.cuh", "behind >= visible.window", "behind > visible.window", WINDOW),
    Mutant("attention.cu", "if (static_cast<int>(blockIdx.y) >= arguments.counts[0]) return;", "", PADDING),
    Mutant("merge.cu", "number < arguments.counts[1];", "number < arguments.counts[1] + 1;", PADDING),
    Mutant("merge.cu", "number += gridDim.z", "number += 1 << 30", PADDING),
    Mutant("slices.cuh", "first_token(slice) < item.kv_end ?", "first_token(slice) <= item.kv_end ?", DECODE + PADDING),
    Mutant("write_kv.cu", "if (slot < 0) return;", "", PADDING),
    Mutant("write_kv.cu", "token < arguments.num_tokens && lane", "token <= arguments.num_tokens && lane", DECODE),
    Mutant(
        "silu_mul.cu", "if (row >= arguments.num_rows) return;", "if (row > arguments.num_rows) return;", ("silu_mul",)
    ),
    Mutant("embedding.cu", "if (token >= arguments.num_tokens) return;", "", ("embedding",)),
    Mutant("rms_norm.cu", "if (chunk >= CHUNKS) continue;", "if (chunk > CHUNKS) continue;", ("rms_norm: 1 x",)),
    Mutant("block_copy.cu", "offset < arguments.block_bytes", "offset <= arguments.block_bytes", ("block_copy",)),
    # which rows, heads and tokens
    Mutant("attention.cuh", "packed / arguments.group : 0, head", "packed / (arguments.group + 1) : 0, head", CHUNKS),
    Mutant(
        "attention.cuh",
        "item.partial_row += kv_head * item.head_rows",
        "item.partial_row += kv_head",
        ("attention: split, two",),
    ),
    Mutant("merge.cu", "kv_head * merge.head_rows", "kv_head", ("attention: split, two",)),
    Mutant("merge.cu", "part * merge.num_rows", "part", SPLIT, index=1),
    Mutant("decode.cuh", "slice += NUM_WARPS)", "slice += NUM_WARPS + 1)", DECODE),
    Mutant(
        "write_kv.cu",
        "% arguments.num_kv_heads, token_in_block",
        "% arguments.num_kv_heads * 0, token_in_block",
        DECODE,
    ),
    Mutant("write_kv.cu", "arguments.positions[token]", "arguments.positions[0]", MIXED),
    Mutant("write_kv.cu", "second * cos.x[i] + first * sin.x[i]", "second * cos.x[i] - first * sin.x[i]", MIXED),
    Mutant("write_kv.cu", "is_value ? nullptr : arguments.k_norm", "arguments.k_norm", MIXED),
    Mutant("prompt_wgmma.cuh", "clear_rows(shared.values[stage], kv_end - first_token(step - 1));", "", WGMMA),
    Mutant("prompt_wgmma.cuh", "clear_rows(shared.keys[stage], kv_end - first_token(step));", "", WGMMA),
    Mutant("prompt_wgmma.cuh", "slice_token(tile) < kv_end ?", "slice_token(tile) <= kv_end ?", WGMMA + WGMMA_ENDS),
    Mutant("prompt_wgmma.cuh", "place.rows, part * PART_ROWS + warp_row);\n  }", "place.rows, warp_row);\n  }", WGMMA),
    Mutant("prompt_wgmma.cuh", "behind(part * PART_ROWS * QueryRows::BYTES)", "behind(0)", WGMMA),
    Mutant("prompt_wgmma.cuh", "item.num_rows <= PART_ROWS", "item.num_rows <= PROMPT_ROWS", WGMMA),
    Mutant("prompt_wgmma.cuh", "block_of(step - 1))", "key_block)", WGMMA),
    Mutant("prompt_wgmma.cuh", "tile % STAGES * sizeof(shared.keys[0])", "0", WGMMA),
    Mutant("prompt_wgmma.cuh", "(tile + 1) % STAGES", "tile % STAGES", WGMMA),
    Mutant("prompt_wgmma.cuh", "part == PARTS - 1 ? tile + 1 : tile", "tile", WGMMA),
    # arithmetic
    Mutant("prompt_wgmma.cuh", "tile >= first_whole && tile < end_whole", "tile >= first_whole", WGMMA),
    Mutant(
        "prompt_wgmma.cuh", "tile >= first_whole && tile < end_whole", "tile < end_whole", ("attention: wgmma, window",)
    ),
    Mutant("prompt_wgmma.cuh", "factor[0] != 1.f || factor[1] != 1.f", "factor[0] != 1.f", WGMMA),
    Mutant("prompt_wgmma.cuh", "wgmma_keys<false>", "wgmma_keys<true>", WGMMA),
    Mutant("prompt_wgmma.cuh", "[n % 2 * 2 + 1] = pack(scores[n][2]", "[n % 2 * 2 + 1] = pack(scores[n][0]", WGMMA),
    Mutant("wgmma.cuh", "STRIDE = Rows::EIGHT_BYTES / 16", "STRIDE = Rows::ATOM_BYTES / 16", WIDE),
    Mutant("wgmma.cuh", "LEADING = Rows::ATOM_BYTES / 16", "LEADING = Rows::EIGHT_BYTES / 16", WIDE),
    Mutant("wgmma.cuh", "Rows::WIDTH == 128 ? 1", "Rows::WIDTH == 128 ? 2", WGMMA),
    Mutant("wgmma.cuh", "k * 32 / Rows::WIDTH * Rows::ATOM_BYTES + ", "", WIDE),
    Mutant("wgmma.cuh", "k * 2 * Rows::EIGHT_BYTES", "k * Rows::EIGHT_BYTES", WGMMA),
    Mutant("tiled.cuh", "c / ATOM_CHUNKS * ATOM_BYTES", "c / ATOM_CHUNKS * WIDTH", WIDE),
    Mutant("tiled.cuh", "row * ATOM_CHUNKS / 8 ^ odd", "odd", WGMMA),
    Mutant("attention_tile.cuh", "a.sum[m][half] *= shift.factor[m][half];", "", DECODE),
    Mutant("attention_tile.cuh", "maximum == NEGATIVE_INFINITY ? 0.f : maximum;", "maximum;", WINDOW),
    Mutant("attention_tile.cuh", "a.sum[m][half] += __shfl_xor_sync(ALL_LANES, a.sum[m][half], 2);", "", DECODE),
    Mutant("attention_tile.cuh", "scale = soft_cap * LOG2_E;", "scale = soft_cap;", ("attention: soft",)),
    Mutant("attention_tile.cuh", "d * 16 + t * 4 + pair * 2", "d * 16 + pair * 8 + t * 2", FP8),
    Mutant("attention.cuh", "arguments.scale * arguments.key_scales[item.kv_head]", "arguments.scale", FP8),
    Mutant("fp8.cuh", "magnitude += 0x7ffff + (magnitude >> 20 & 1);", "", FP8),
    Mutant("merge.cu", "sum += factor * __uint_as_float(state.y);", "sum += __uint_as_float(state.y);", SPLIT),
    Mutant("rms_norm.cu", "sum / SIZE", "sum / (SIZE + 32)", NORM),
    Mutant("silu_mul.cu", "/ (1.f + exp2_approx", "/ (exp2_approx", ("silu_mul",)),
    Mutant("sample.cu", "uint64_t x0 = index + 1,", "uint64_t x0 = index,", SAMPLE),
    Mutant("sample.cu", "above + sum >= target", "above + sum > target", SAMPLE),
    Mutant("sample.cu", "target >= shared.scratch[warp]", "target > 2 * shared.scratch[warp]", SAMPLE),
    Mutant("vocabulary.cuh", "| ~static_cast<uint32_t>(token)", "| static_cast<uint32_t>(token)", SAMPLE),
    Mutant("vocabulary.cuh", "first + 8 <= end", "first <= end", SAMPLE),
    Mutant("vocabulary.cuh", "first >= begin &&", "", SAMPLE),
    Mutant("vocabulary.cuh", "group * 8 - before < end", "group * 8 < end", SAMPLE),
    Mutant("vocabulary.cuh", "min(first + 8, end)", "first + 8", SAMPLE),
    Mutant("adjust.cu", "allowed >> i & 1", "allowed & 1", ADJUST),
    Mutant("adjust.cu", "load_16B(penalties.counts + token + 4)", "load_16B(penalties.counts + token)", ADJUST),
    Mutant("merge.cu", "__uint_as_float(four.z)", "__uint_as_float(four.w)", SPLIT),
    Mutant("adjust.cu", "logit > 0.f ? logit / repetition : logit * repetition", "logit / repetition", ADJUST),
    Mutant("adjust.cu", "times ? logit", "count ? logit", ADJUST),
    Mutant("adjust.cu", "count += drafts[i] == token", "count += drafts[0] == token", ADJUST),
    Mutant("log_probabilities.cu", "if (key < bound)", "if (key <= bound)", ("log_probabilities",)),
    # quantised weights
    Mutant("quantized_linear.cu", "  __syncthreads();\n", "", QUANTIZED),
    Mutant(
        "quantized_linear.cu", "const bool exists = column < columns && output", "const bool exists = output", QUANTIZED
    ),
    Mutant("quantized_linear.cu", "column < columns && row < arguments.num_rows", "column < columns", QUANTIZED),
    Mutant(
        "quantized_linear.cu",
        "first_row + row >= arguments.num_rows",
        "first_row + row > arguments.num_rows",
        QUANTIZED,
    ),
    Mutant(
        "quantized_linear.cu",
        "{x[m][0].z, x[m][1].z, x[m][0].w, x[m][1].w}, w2, w3",
        "{x[m][0].z, x[m][1].z, x[m][0].w, x[m][1].w}, w3, w2",
        QUANTIZED,
    ),
    Mutant("quantized_linear.cu", "warp < NUM_WARPS; warp++", "warp < NUM_WARPS - 1; warp++", QUANTIZED),
    Mutant("quantized_linear.cu", "if (arguments.bias)", "if (false)", QUANTIZED),
    Mutant("quantized.cuh", "column / group) * 2", "column / (group + 32)) * 2", QUANTIZED),
    Mutant("quantized.cuh", " ^ 0x80808080u", "", QUANTIZED),
    Mutant("quantized.cuh", ">> i % 2 * 16", "", QUANTIZED),
    Mutant("quantized.cuh", "high_half(both) * factor", "high_half(both)", QUANTIZED),
    Mutant("dequantize.cu", "if (row >= arguments.rows) return;", "", ("dequantize",)),
    Mutant("dequantize.cu", "run.pair(i * 4 + 3)", "run.pair(i * 4)", ("dequantize",)),
]
