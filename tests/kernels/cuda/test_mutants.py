"""The cases notice when a kernel is wrong: each mutant is one mistake. All take minutes; CI tries a few small ones."""

from pathlib import Path

import pytest

from evenhand_kernels.checks.mutants import MUTANTS, Mutant, caught_by
from evenhand_kernels.cuda.source import SOURCE_DIR

QUICK = ("rms_norm.cu", "silu_mul.cu", "count_tokens.cu", "adjust.cu", "embedding.cu", "block_copy.cu")
"""Kernels that compile in a moment; and of attention's mutants every twelfth."""


def quick(mutants: list[Mutant]) -> list[Mutant]:
    return [mutant for index, mutant in enumerate(mutants) if mutant.file in QUICK or index % 12 == 3]


@pytest.mark.parametrize("mutant", quick(MUTANTS), ids=str)
def test_mutant_is_caught(emulation_dir: Path, mutant: Mutant) -> None:
    assert caught_by(mutant, emulation_dir)


@pytest.mark.soak
@pytest.mark.parametrize("mutant", [mutant for mutant in MUTANTS if mutant not in quick(MUTANTS)], ids=str)
def test_every_mutant_is_caught(emulation_dir: Path, mutant: Mutant) -> None:
    assert caught_by(mutant, emulation_dir)


def test_there_are_enough() -> None:
    assert len(MUTANTS) >= 40
    assert {mutant.file for mutant in MUTANTS} >= {path.name for path in SOURCE_DIR.glob("*.cu")} - {"attention.cu"}
