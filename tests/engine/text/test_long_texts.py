"""Of a long text only as much is tokenized as is needed, and what is told is that of the whole."""

from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from evenhand_engine.text import long_texts
from evenhand_engine.text.tokenizer import TextTooLongError, Tokenizer

WORDS = [chr(97 + number % 26) * (1 + number % 7) for number in range(20_000)]
TEXTS = {
    "words": " ".join(WORDS),
    "one word": "xy" * 60_000,
    "characters": "日本語 é 🪐 " * 6_000,
    "dense behind": "a" * 90_000 + " b c d" * 5_000,
    "dense before": " b c d" * 5_000 + (" " + 16 * "a") * 5_000,
    "short": "a b c",
}


class Counted:
    """A tokenizer that knows how many bytes it was asked for."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.num_bytes = 0

    def encode_batch_fast(self, texts: list[str], **options: Any) -> Any:
        self.num_bytes += sum(len(text.encode()) for text in texts)
        return self._inner.encode_batch_fast(texts, **options)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Of bytes, and of runs of up to eight of the letter a."""
    directory: Path = tmp_path_factory.mktemp("bytes")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: number for number, text in enumerate([*letters, "aa", "aaaa", "aaaaaaaa"])}
    made = tokenizers.Tokenizer(models.BPE(vocabulary, [("a", "a"), ("aa", "aa"), ("aaaa", "aaaa")]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.save(str(directory / "tokenizer.json"))
    return Tokenizer(directory)


@pytest.fixture
def counted(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Counted:
    found = Counted(tokenizer._tokenizer)
    monkeypatch.setattr(tokenizer, "_tokenizer", found)
    return found


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("num_tokens", [1, 100, 3000])
def test_the_end_is_that_of_the_whole(tokenizer: Tokenizer, counted: Counted, name: str, num_tokens: int) -> None:
    text = TEXTS[name]
    whole = tokenizer.encode(text)
    counted.num_bytes = 0
    assert tokenizer.encode_end(text, num_tokens) == whole[-num_tokens:]
    assert counted.num_bytes <= max(len(text.encode()), 2 * 8 * 5 * (num_tokens + 2 * long_texts.MARGIN))


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("max_tokens", [10, 1000, 20_000, 100_000])
def test_what_is_too_long_is_as_by_the_whole(tokenizer: Tokenizer, name: str, max_tokens: int) -> None:
    whole = tokenizer.encode(TEXTS[name])
    if len(whole) <= max_tokens:
        assert tokenizer.encode(TEXTS[name], max_tokens=max_tokens) == whole
    else:
        with pytest.raises(TextTooLongError) as caught:
            tokenizer.encode(TEXTS[name], max_tokens=max_tokens)
        assert max_tokens < caught.value.num_tokens <= len(whole)


def test_the_beginning_tells(tokenizer: Tokenizer, counted: Counted) -> None:
    """A quarter of it has too many tokens, though all might be of the longest."""
    with pytest.raises(TextTooLongError):
        tokenizer.encode(TEXTS["one word"], max_tokens=15_500)
    assert counted.num_bytes == 5 * (15_500 + 2 * long_texts.MARGIN)
    counted.num_bytes = 0
    with pytest.raises(TextTooLongError):
        tokenizer.encode(TEXTS["one word"], max_tokens=14_000)
    assert counted.num_bytes == 0, "the bytes alone do"


BEGIN, END = ("<s>", 259), ("</s>", 260)
SPECIAL = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[BEGIN, END])


@pytest.mark.parametrize(
    "around",
    [
        processors.ByteLevel(),
        SPECIAL,
        processors.TemplateProcessing(single="<s> <s> $A", special_tokens=[BEGIN]),
        processors.TemplateProcessing(single="$A </s>", special_tokens=[END]),
        processors.BertProcessing(END, BEGIN),
        processors.RobertaProcessing(END, BEGIN),
        processors.Sequence([processors.ByteLevel(), SPECIAL]),
    ],
    ids=["none", "both", "twice", "end", "bert", "roberta", "sequence"],
)
@pytest.mark.parametrize("adds", [True, False])
def test_parts_make_up_the_whole(tokenizer: Tokenizer, around: Any, adds: bool) -> None:
    """With the special tokens around it once, whichever stand in the text."""
    made = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    made.add_special_tokens(["<s>", "</s>"])
    made.post_processor = around
    for text in ("", "a", "<s> b </s>" * 9, "aaaab " * 11):
        made.no_truncation()
        whole = made.encode_batch_fast([text], add_special_tokens=adds)[0].ids
        for size in (3, 4, 7, 1000):
            made.enable_truncation(size)
            [encoding] = made.encode_batch_fast([text], add_special_tokens=adds)
            assert len(encoding) <= size
            assert long_texts.token_ids(encoding) == whole


def test_no_part_of_a_long_text_is_long(tokenizer: Tokenizer) -> None:
    """Python stands still while its ids are made."""
    [encoding] = tokenizer._tokenizer.encode_batch_fast(["xy" * 60_000])
    assert len(encoding) == long_texts.PART_TOKENS
    assert len(tokenizer.encode("xy" * 60_000)) == 120_000


def test_a_part_is_whole_characters_from_a_space_on() -> None:
    text = ("é" * 2000 + " wort " * 400).encode()
    assert all(part == text.decode()[: len(part)] for part in long_texts.beginnings(text, 1))
    found = list(long_texts.ends(text, 1))
    assert found and all(text.decode().endswith(part) for part in found)
    assert found[0].startswith(" "), "a word has not been cut"
