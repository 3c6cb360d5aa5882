"""Cases of rms_norm, silu_mul, embedding and block_copy, through their launchers."""

from functools import partial

import numpy as np
import torch

from evenhand_kernels.checks.case import Case, assert_close, exact, random_tensor
from evenhand_kernels.cuda import variants
from evenhand_kernels.cuda.kernels import CudaKernels
from evenhand_kernels.device import Device

TOLERANCES = {torch.bfloat16: 0.04, torch.float16: 0.005}


def check_rms_norm(device: Device, *, rows: int, size: int, dtype: torch.dtype, added: bool) -> None:
    rng, kernels = np.random.default_rng(rows * size), CudaKernels(device, dtype)
    x, residual = (random_tensor(rng, rows, size, dtype=dtype, device=device) for _ in range(2))
    weight = random_tensor(rng, size, dtype=torch.float32, device=device)
    before = exact(residual)
    total = before + exact(x) if added else before
    if added:
        result = kernels.add_rms_norm(x, residual, weight, 1e-5)
        assert_close(residual, total, TOLERANCES[dtype])
    else:
        result = kernels.rms_norm(residual, weight, 1e-5)
        assert (exact(residual) == before).all(), "the input has changed"
    expected = total / np.sqrt(np.square(total).mean(-1, keepdims=True) + 1e-5) * exact(weight)
    assert_close(result, expected, TOLERANCES[dtype])


def check_gated_linear(device: Device, *, rows: int, size: int, dtype: torch.dtype) -> None:
    rng, kernels = np.random.default_rng(rows * size), CudaKernels(device, dtype)
    weight = random_tensor(rng, 2 * size, 16, dtype=dtype, device=device)
    x = random_tensor(rng, rows, 16, dtype=dtype, device=device)
    gate, up = np.split(exact(torch.nn.functional.linear(x, weight)), 2, axis=-1)
    expected = gate / (1 + np.exp(-np.clip(gate, -700, None))) * up
    assert_close(kernels.gated_linear(weight, None)(x), expected, TOLERANCES[dtype])


def check_gate_saturates(device: Device, *, dtype: torch.dtype) -> None:
    launch = device.load(variants.silu_mul(dtype))
    gates = [-60000.0, -200.0, -89.0, 0.0, 89.0, 200.0, 60000.0, 1.0]
    gate_up = torch.tensor([gates + [1.0] * 8], dtype=dtype, device=device.torch_device)
    output = torch.full((1, 8), torch.nan, dtype=dtype, device=device.torch_device)
    launch(1, gate_up=gate_up, output=output, num_rows=1, size=8)
    gate = exact(gate_up)[:, :8]
    assert_close(output, gate / (1 + np.exp(np.clip(-gate, None, 700))), TOLERANCES[dtype])


def check_embedding(device: Device, *, tokens: int, size: int, dtype: torch.dtype) -> None:
    rng, kernels = np.random.default_rng(tokens), CudaKernels(device, dtype)
    table = random_tensor(rng, 11, size, dtype=dtype, device=device)
    token_ids = torch.from_numpy(rng.integers(0, 11, tokens).astype(np.int32)).to(device.torch_device)
    assert torch.equal(kernels.embedding(table)(token_ids), table[token_ids.long()])


def check_block_copy(device: Device, *, pairs: int, block_bytes: int) -> None:
    rng = np.random.default_rng(pairs)
    cache = torch.from_numpy(rng.integers(0, 256, (2 * pairs + 1, block_bytes)).astype(np.uint8)).to(
        device.torch_device
    )
    chosen = torch.from_numpy(rng.permutation(2 * pairs).reshape(-1, 2).astype(np.int32)).to(device.torch_device)
    expected = cache.clone()
    expected[chosen[:, 1].long()] = cache[chosen[:, 0].long()]
    launch = device.load(variants.block_copy())
    launch((pairs, 2), pairs=chosen, cache=cache, block_bytes=block_bytes)
    assert torch.equal(cache, expected)


def _cases() -> list[Case]:
    cases = []
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        for rows, size in ((1, 8), (3, 576), (2, 5000)):
            for added in (False, True):
                run = partial(check_rms_norm, rows=rows, size=size, dtype=dtype, added=added)
                cases.append(Case(f"rms_norm: {rows} x {size}, added={added}, {name}", frozenset({"rms_norm"}), run))
        for rows, size in ((1, 8), (7, 304)):
            run = partial(check_gated_linear, rows=rows, size=size, dtype=dtype)
            cases.append(Case(f"silu_mul: {rows} x {size}, {name}", frozenset({"silu_mul"}), run))
        run = partial(check_gate_saturates, dtype=dtype)
        cases.append(Case(f"silu_mul: the gate saturates, {name}", frozenset({"silu_mul"}), run))
        for tokens, size in ((1, 8), (37, 72)):
            run = partial(check_embedding, tokens=tokens, size=size, dtype=dtype)
            cases.append(Case(f"embedding: {tokens} x {size}, {name}", frozenset({"embedding"}), run))
    for pairs, block_bytes in ((1, 16), (3, 12_304)):
        run = partial(check_block_copy, pairs=pairs, block_bytes=block_bytes)
        cases.append(Case(f"block_copy: {pairs} blocks of {block_bytes} bytes", frozenset({"block_copy"}), run))
    return cases


CASES = _cases()
