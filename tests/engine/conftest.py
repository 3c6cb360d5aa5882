"""A tokenizer that writes any bytes, for outputs that follow grammars."""

import json

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from evenhand_engine.structured.compiler import Compiler
from evenhand_engine.text.tokenizer import Tokenizer

EOS = 256
VOCAB_SIZE = 261  # more than the tokenizer knows, as of models whose embeddings are padded


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A token for each byte, and the end."""
    directory = tmp_path_factory.mktemp("bytes")
    vocabulary = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(["<|end|>"])
    made.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    (directory / "config.json").write_text(json.dumps({"vocab_size": VOCAB_SIZE}))
    return Tokenizer(directory)


@pytest.fixture
def compiler(tokenizer: Tokenizer) -> Compiler:
    return Compiler(lambda: tokenizer)
