"""A GGUF file's tokenizer gives the ids that llama.cpp gives, for every pre-tokenizer, and says what it cannot read.

The expected ids were taken from llama.cpp itself, on files like those made here: data/*.json name release and call.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from gguf import TokenType
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from evenhand_engine.errors import StartupError
from evenhand_engine.model.gguf.file import GgufFile
from evenhand_engine.model.gguf.pretokenizers import PRE_TOKENIZERS
from evenhand_engine.model.gguf.tokenizer import build_tokenizer, read_vocabulary, tokenizer_config
from evenhand_engine.model.source import resolve_model_dir

DATA = Path(__file__).parent / "data"
BYTE_LEVEL = json.loads((DATA / "llama_cpp_ids.json").read_text())
SENTENCEPIECE = json.loads((DATA / "llama_cpp_sentencepiece_ids.json").read_text())

Keys = Callable[[gguf.GGUFWriter], None]


@pytest.fixture
def gguf_file(tmp_path: Path) -> Callable[[Keys], GgufFile]:
    """Writes a file of these keys and no tensors."""

    def write(*keys: Keys) -> GgufFile:
        writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
        for add in keys:
            add(writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return GgufFile(tmp_path / "tiny.gguf")

    return write


def tokenizer_of(file: GgufFile) -> Tokenizer:
    return build_tokenizer(file, read_vocabulary(file))


def byte_level(writer: gguf.GGUFWriter) -> None:
    """Special tokens, bytes, what the merges make, and two tokens that no merge makes."""
    merges = BYTE_LEVEL["merges"]
    made = [merge.replace(" ", "") for merge in merges]
    tokens = ["<|end|>", "<|start|>", *sorted(ByteLevel.alphabet()), *made, *BYTE_LEVEL["unmerged"]]
    tokens = list(dict.fromkeys(tokens))  # several merges may make one token
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL] * 2 + [TokenType.NORMAL] * (len(tokens) - 2))
    writer.add_token_merges(merges)
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(1)


def sentencepiece(writer: gguf.GGUFWriter) -> None:
    """Pieces, the best first, after the special tokens and bytes; last a token that the user defined."""
    pieces = SENTENCEPIECE["pieces"]
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL] + [TokenType.BYTE] * 256
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, "<tool>"])
    writer.add_token_types([*kinds, *[TokenType.NORMAL] * len(pieces), TokenType.USER_DEFINED])
    writer.add_token_scores([0.0] * 259 + [-float(rank) for rank in range(len(pieces))] + [0.0])


@pytest.mark.parametrize("family", BYTE_LEVEL["families"], ids=lambda family: family["names"][0])
def test_a_pre_tokenizer_gives_the_ids_of_llama_cpp(gguf_file: Callable[..., GgufFile], family: dict[str, Any]) -> None:
    one_of_each_kind = {PRE_TOKENIZERS[name]: name for name in family["names"]}.values()
    for name in one_of_each_kind:
        tokenizer = tokenizer_of(gguf_file(byte_level, lambda writer, name=name: writer.add_tokenizer_pre(name)))
        for text, ids in zip(BYTE_LEVEL["texts"], family["ids"], strict=True):
            assert tokenizer.encode(text, add_special_tokens=False).ids == ids, text
            assert tokenizer.decode(ids, skip_special_tokens=False) == text
        assert tokenizer.encode("1").tokens == (["<|start|>", "1"] if family["add_bos"] else ["1"])


def test_every_pre_tokenizer_is_held_against_llama_cpp() -> None:
    assert {name for family in BYTE_LEVEL["families"] for name in family["names"]} == set(PRE_TOKENIZERS)
    assert all(len(family["ids"]) == len(BYTE_LEVEL["texts"]) >= 24 for family in BYTE_LEVEL["families"])


@pytest.mark.parametrize("kind, keys", [("prefixed", []), ("plain", [lambda w: w.add_add_space_prefix(False)])])
def test_sentencepiece_gives_the_ids_of_llama_cpp(
    gguf_file: Callable[..., GgufFile], kind: str, keys: list[Keys]
) -> None:
    tokenizer = tokenizer_of(gguf_file(sentencepiece, *keys))
    for text, ids in zip(SENTENCEPIECE["texts"], SENTENCEPIECE[kind], strict=True):
        assert tokenizer.encode(text, add_special_tokens=False).ids == ids, text
        if "<tool>" not in text:
            assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.encode("a").tokens[0] == "<s>"


def test_the_default_model_gives_the_ids_of_llama_cpp() -> None:
    tokenizer = Tokenizer.from_file(str(resolve_model_dir(None) / "tokenizer.json"))
    for text, ids in zip(BYTE_LEVEL["texts"], BYTE_LEVEL["default_model"], strict=True):
        text = text.replace("<|start|>", "<|im_start|>").replace("<|end|>", "<|im_end|>")
        assert tokenizer.encode(text).ids == ids, text


def test_a_file_without_a_pre_tokenizer_has_the_default_one(gguf_file: Callable[..., GgufFile]) -> None:
    default = next(family for family in BYTE_LEVEL["families"] if "default" in family["names"])
    tokenizer = tokenizer_of(gguf_file(byte_level))
    assert [tokenizer.encode(text).ids for text in BYTE_LEVEL["texts"]] == default["ids"]


def test_special_tokens_surround_a_prompt_where_the_file_says_so(gguf_file: Callable[..., GgufFile]) -> None:
    both = [lambda w: w.add_add_bos_token(True), lambda w: w.add_add_eos_token(True)]
    assert tokenizer_of(gguf_file(byte_level, *both)).encode("1").tokens == ["<|start|>", "1", "<|end|>"]
    none = [lambda w: w.add_tokenizer_pre("llama-bpe"), lambda w: w.add_add_bos_token(False)]
    assert tokenizer_of(gguf_file(byte_level, *none)).encode("1").tokens == ["1"]


def test_a_turn_ends_at_every_token_that_llama_cpp_ends_it_at(gguf_file: Callable[..., GgufFile]) -> None:
    def keys(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(["<eos>", "<eot>", "<eom>", "<|im_end|>", "</s>", "a", "aa"])
        writer.add_token_merges(["a a"])
        writer.add_eos_token_id(0)
        writer.add_eot_token_id(1)
        writer.add_eom_token_id(2)

    file = gguf_file(keys)
    vocabulary = read_vocabulary(file)
    assert vocabulary.end_ids == {0, 1, 2, 3}  # </s> is mere text where no key says otherwise
    assert build_tokenizer(file, vocabulary).decode([0, 3, 5], skip_special_tokens=True) == "a"


def test_templates_and_special_tokens_go_into_the_config(gguf_file: Callable[..., GgufFile]) -> None:
    named = {"name": "tool_use", "template": "{{ tools }}"}
    file = gguf_file(byte_level, lambda w: w.add_chat_template([{"name": "default", "template": "{{ x }}"}, named]))
    config = tokenizer_config(file, read_vocabulary(file))
    assert (config["bos_token"], config["eos_token"]) == ("<|start|>", "<|end|>")
    assert config["chat_template"] == [{"name": "default", "template": "{{ x }}"}, named]


@pytest.mark.parametrize(
    "keys, message",
    [
        ([], r"lacks tokenizer\.ggml\.tokens"),
        (
            [byte_level, lambda w: w.add_tokenizer_pre("nobody's")],
            r"tokenizer\.ggml\.pre \"nobody's\", .* not supported",
        ),
        ([byte_level, lambda w: w.add_tokenizer_pre("gemma4")], r"tokenizer\.ggml\.pre 'gemma4'"),
        ([byte_level, lambda w: w.add_pad_token_id(1_000_000)], r"padding_token_id = 1000000, but only \d+ tokens"),
        ([byte_level, lambda w: w.add_eot_token_id(1123)], r"eot_token_id = 1123, but only 1123 tokens"),
        (
            [lambda w: w.add_tokenizer_model("rwkv"), lambda w: w.add_token_list(["a"])],
            r"tokenizer\.ggml\.model 'rwkv', .* supported are gpt2 and llama",
        ),
        (
            [lambda w: w.add_tokenizer_model("gpt2"), lambda w: w.add_token_list(["a"])],
            r"lacks tokenizer\.ggml\.merges",
        ),
        (
            [
                lambda w: w.add_tokenizer_model("gpt2"),
                lambda w: w.add_token_list(["a", "b"]),
                lambda w: w.add_token_merges(["a b"]),
            ],
            "merges 'a' and 'b' .* no token 'ab'",
        ),
        (
            [
                lambda w: w.add_tokenizer_model("gpt2"),
                lambda w: w.add_token_list(["a", "b"]),
                lambda w: w.add_token_merges(["ab"]),
            ],
            "'ab' in tokenizer.ggml.merges, which is no pair",
        ),
        (
            [lambda w: w.add_tokenizer_model("gpt2"), lambda w: w.add_token_list(["a", "a"])],
            "the token 'a' twice",
        ),
        (
            [
                lambda w: w.add_tokenizer_model("llama"),
                lambda w: w.add_token_list(["a", "b", "c"]),
                lambda w: w.add_token_scores([0.0]),
            ],
            r"1 entries in tokenizer\.ggml\.scores for 3 tokens",
        ),
        (
            [
                lambda w: w.add_tokenizer_model("gpt2"),
                lambda w: w.add_token_list(["a"]),
                lambda w: w.add_token_types([1, 1]),
            ],
            r"2 entries in tokenizer\.ggml\.token_type for 1 tokens",
        ),
        (
            [
                lambda w: w.add_tokenizer_model("gpt2"),
                lambda w: w.add_tokenizer_pre("tekken"),
                lambda w: w.add_token_list(["a", "aa"]),
                lambda w: w.add_token_merges(["a a"]),
            ],
            r"lacks tokenizer\.ggml\.bos_token_id, a token that its tokenizer adds",
        ),
        ([byte_level, lambda w: w.add_uint32("tokenizer.chat_template", 7)], r"tokenizer\.chat_template is malformed"),
    ],
)
def test_what_does_not_fit_is_named(gguf_file: Callable[..., GgufFile], keys: list[Keys], message: str) -> None:
    with pytest.raises(StartupError, match=message) as caught:
        file = gguf_file(*keys)
        vocabulary = read_vocabulary(file)
        build_tokenizer(file, vocabulary)
        tokenizer_config(file, vocabulary)
    assert "tiny.gguf" in str(caught.value) and "\n" not in str(caught.value)
