"""Special tokens are found wherever transformers finds them, and cut out of text as there."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from evenhand_engine.errors import StartupError
from evenhand_engine.text.tokenizer import Tokenizer

TEMPLATE = "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ image_token }}"
TEXTS = ["a<s>b", "b</s> a", "a <img> b", "<extra>a", "ab<|end|>", "x <pad>", "a<tool>b"]
FILES: dict[str, dict[str, Any]] = {
    "config": {"tokenizer_config.json": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": None}},
    "objects": {"tokenizer_config.json": {"bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": True}}},
    "map": {
        "tokenizer_config.json": {"bos_token": "<img>"},
        "special_tokens_map.json": {"bos_token": "<s>", "eos_token": {"content": "</s>", "normalized": False}},
    },
    "decoder": {
        "tokenizer_config.json": {
            "eos_token": "<|end|>",
            "added_tokens_decoder": {
                "3": {"content": "<|end|>", "special": True, "lstrip": False, "rstrip": False, "normalized": False},
                "4": {"content": "<tool>", "special": False, "lstrip": False, "rstrip": False, "normalized": False},
            },
        },
        "special_tokens_map.json": {"eos_token": "</s>"},
    },
    "extra list": {"tokenizer_config.json": {"additional_special_tokens": ["<extra>", "<img>"]}},
    "extra names": {"tokenizer_config.json": {"extra_special_tokens": {"image_token": "<img>"}, "eos_token": "</s>"}},
    "model's own": {"tokenizer_config.json": {"image_token": "<img>", "bos_token": "<s>"}},
    "added": {"tokenizer_config.json": {"eos_token": "<|end|>"}, "added_tokens.json": {"<|end|>": 3, "<tool>": 4}},
}


def write_model(directory: Path, files: dict[str, Any]) -> None:
    letters = {letter: i for i, letter in enumerate("abx<>/|endtolimgpskr ")}
    backend = Backend(models.BPE(vocab=letters, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    backend.add_special_tokens([AddedToken("<pad>", special=True)])
    backend.save(str(directory / "tokenizer.json"))
    for name, content in files.items():
        content = (
            {"tokenizer_class": "PreTrainedTokenizerFast"} | content if name == "tokenizer_config.json" else content
        )
        (directory / name).write_text(json.dumps(content))
    (directory / "chat_template.jinja").write_text(TEMPLATE)


@pytest.mark.parametrize("kind", FILES)
def test_as_transformers_reads_them(tmp_path: Path, kind: str) -> None:
    write_model(tmp_path, FILES[kind])
    ours, theirs = Tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    conversation = [{"role": "user", "content": ""}]
    assert ours.render_chat(conversation) == theirs.apply_chat_template(conversation, tokenize=False)
    for text in TEXTS:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text, add_special_tokens=False) == ids, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert theirs.eos_token_id is None or theirs.eos_token_id in ours.eos_token_ids


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config.json": {"bos_token": 7}},
        {"tokenizer_config.json": {"added_tokens_decoder": {"x": {"content": "<s>"}}}},
        {"tokenizer_config.json": {"additional_special_tokens": [{"lstrip": True}]}},
        {"added_tokens.json": {"<s>": "many"}},
    ],
)
def test_malformed_ones_are_said_so(tmp_path: Path, files: dict[str, Any]) -> None:
    write_model(tmp_path, files)
    with pytest.raises(StartupError, match=r"the special tokens of .* are malformed: .+"):
        Tokenizer(tmp_path)
