"""Of the kernels that do the same, the one that a device is fastest with; all that it can run are tried."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from evenhand_kernels.cuda.choice import fastest_attention
from evenhand_kernels.cuda.source import Variant
from evenhand_kernels.cuda.variants import AttentionChoice
from evenhand_kernels.device import Launch
from evenhand_kernels.emulation.device import EmulatedDevice
from evenhand_kernels.kernels import AttentionLayer, KvCacheShape

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn


class TimedDevice(EmulatedDevice):
    """What is launched takes as long as `costs` says of its constants."""

    def __init__(self, directory: Path, architecture: str, costs: dict[str, float]) -> None:
        super().__init__(directory, checked=False, num_multiprocessors=1)
        self.architecture = architecture
        self.tried: list[frozenset[str]] = []
        self._costs, self._seconds = costs, 0.0

    def load(self, variant: Variant) -> Launch:
        launch = super().load(variant)
        if variant.kernel != "attention":
            return launch
        flags = frozenset(name for name, value in variant.constants if value is None) & {"BULK_COPY", "WGMMA"}

        def timed(grid: int | tuple[int, ...], **arguments: torch.Tensor | int | float | None) -> None:
            launch(grid, **arguments)
            self.tried.append(flags)
            self._seconds = 1.0 + sum(self._costs[flag] for flag in flags)

        return timed

    def seconds(self, work: Callable[[], object], rounds: int) -> float:
        work()
        return self._seconds


@pytest.mark.parametrize(
    "architecture, kv_dtype, costs, expected, num_tried",
    [
        ("sm_80", BF16, {}, AttentionChoice(), 0),
        ("sm_90", BF16, {"BULK_COPY": -0.1, "WGMMA": -0.1}, AttentionChoice(bulk_copy=True, wgmma=True), 4),
        ("sm_90", BF16, {"BULK_COPY": 0.1, "WGMMA": -0.1}, AttentionChoice(wgmma=True), 4),
        ("sm_90", BF16, {"BULK_COPY": -0.1, "WGMMA": 0.1}, AttentionChoice(bulk_copy=True), 4),
        ("sm_90", BF16, {"BULK_COPY": 0.0, "WGMMA": 0.0}, AttentionChoice(), 4),
        ("sm_90", FP8, {"BULK_COPY": -0.1}, AttentionChoice(bulk_copy=True), 2),
        ("sm_100", BF16, {"BULK_COPY": -0.1}, AttentionChoice(bulk_copy=True), 2),
    ],
)
def test_the_fastest_is_taken(
    emulation_dir: Path,
    architecture: str,
    kv_dtype: torch.dtype,
    costs: dict[str, float],
    expected: AttentionChoice,
    num_tried: int,
) -> None:
    device = TimedDevice(emulation_dir, architecture, costs)
    layer = AttentionLayer(num_heads=2, num_kv_heads=1, head_dim=64, eps=1e-5)
    assert fastest_attention(device, BF16, layer, KvCacheShape(1, 16, kv_dtype)) == expected
    assert len(device.tried) == num_tried
