"""Vocabularies tell how a model is asked to fill in the middle."""

import pytest

from evenhand_engine.text.fill_in_middle import FillInMiddle, find_fill_in_middle

QWEN = {"<|fim_prefix|>": 10, "<|fim_suffix|>": 11, "<|fim_middle|>": 12, "<|fim_pad|>": 13, "<|endoftext|>": 1}


@pytest.mark.parametrize(
    ("vocabulary", "prompt", "stops"),
    [
        (QWEN, [10, 1, 2, 11, 3, 12], {10, 11, 12, 13}),
        ({"<fim_prefix>": 5, "<fim_suffix>": 6, "<fim_middle>": 7}, [5, 1, 2, 6, 3, 7], {5, 6, 7}),
        ({"[SUFFIX]": 5, "[PREFIX]": 6, "[MIDDLE]": 7}, [5, 3, 6, 1, 2], {5, 6}),
        ({"▁<PRE>": 5, "▁<SUF>": 6, "▁<MID>": 7, "▁<EOT>": 8}, [5, 1, 2, 6, 3, 7], {5, 6, 7, 8}),
    ],
)
def test_by_the_tokens_that_there_are(vocabulary: dict[str, int], prompt: list[int], stops: set[int]) -> None:
    form = find_fill_in_middle(vocabulary.get)
    assert isinstance(form, FillInMiddle)
    assert form.prompt([1, 2], [3]) == prompt
    assert form.stop_token_ids == stops


@pytest.mark.parametrize("missing", ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"])
def test_none_where_one_is_missing(missing: str) -> None:
    assert find_fill_in_middle({name: i for name, i in QWEN.items() if name != missing}.get) is None
    assert find_fill_in_middle({"<|fim_prefix|>": 0, "<|fim_suffix|>": 1, "<|fim_middle|>": 2}.get) is not None
