"""docs/models.md lists what the loader takes, no more and no less."""

import re
from pathlib import Path

from evenhand_engine.model.config import SUPPORTED_ARCHITECTURES
from evenhand_engine.model.gguf.config import ARCHITECTURES
from evenhand_engine.model.gguf.pretokenizers import PRE_TOKENIZERS
from evenhand_engine.model.gguf.tensor_names import STORAGE
from evenhand_engine.model.rope_config import SUPPORTED_ROPE_TYPES

ROOT = Path(__file__).parents[3]
SECTIONS = re.split(r"^## (.+)$", (ROOT / "docs/models.md").read_text(), flags=re.MULTILINE)


def section(title: str) -> str:
    return SECTIONS[SECTIONS.index(title) + 1]


def test_architectures() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `?(\w*)`? ?\|", section("Architectures"), re.MULTILINE)
    assert {hugging_face for hugging_face, _ in rows} == set(SUPPORTED_ARCHITECTURES)
    assert {gguf for _, gguf in rows if gguf} == set(ARCHITECTURES)


def test_rope_kinds() -> None:
    assert set(SUPPORTED_ROPE_TYPES) <= set(re.findall(r"`(\w+)`", section("Rope")))


def test_quantisations() -> None:
    kinds, _, in_memory = section("Quantisations of GGUF files").partition("In memory")
    listed = re.findall(r"[A-Z][A-Z0-9_]+", kinds)
    assert sorted(listed) == sorted(kind.name for kind in STORAGE)
    assert set(re.findall(r"\bI?Q\d\w+", in_memory)) <= set(listed)


def test_pre_tokenizers() -> None:
    listed = section("Tokenizers of GGUF files").split("refused:")[1].split("A turn ends")[0]
    assert set(re.findall(r"`([^`]+)`", listed)) == set(PRE_TOKENIZERS)
    assert "refused" in section("Tokenizers of GGUF files")


def test_every_test_that_is_named_exists() -> None:
    for path in re.findall(r"`(tests/[^`]+)`", SECTIONS[0]):
        assert (ROOT / path).is_file(), path
