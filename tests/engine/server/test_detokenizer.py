"""Text comes out whole, in order and cut at the right place, however tokens divide it."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from evenhand_engine.text.detokenizer import Detokenizer, Piece, StopMatcher, text_of
from evenhand_engine.text.text_decoder import ByteDecoder, TextDecoder, WindowDecoder
from evenhand_engine.text.tokenizer import Tokenizer


def decode_bytes(token_ids: Sequence[int]) -> str:
    """A vocabulary of the 256 bytes: the hardest case, since every code point beyond ASCII is split."""
    return bytes(token_ids).decode("utf-8", "replace")


BYTES = {byte: bytes([byte]) for byte in range(256)}
MakeDecoder = Callable[[], TextDecoder]
each_decoder = pytest.mark.parametrize(
    "make_decoder", [lambda: WindowDecoder(decode_bytes), lambda: ByteDecoder(BYTES)], ids=["window", "bytes"]
)


def cut(text: str, stop: Sequence[str]) -> str:
    """`text` up to the stop string that is complete first; the longest of those that end there."""
    ends = [(end, end - len(s)) for end in range(len(text) + 1) for s in stop if text[:end].endswith(s)]
    return text[: min(ends)[1]] if ends else text


@each_decoder
@given(text=st.text())
def test_pieces_join_to_the_text(make_decoder: MakeDecoder, text: str) -> None:
    decoder = make_decoder()
    pieces = [decoder.push(byte) for byte in text.encode()]
    assert "".join(pieces) == text
    assert decoder.flush() == ""


@each_decoder
@given(text=st.text(), tail=st.text(max_size=3))
def test_nothing_is_shown_that_must_be_taken_back(make_decoder: MakeDecoder, text: str, tail: str) -> None:
    decoder = make_decoder()
    shown = ""
    for byte in (text + tail).encode():
        shown += decoder.push(byte)
        assert (text + tail).startswith(shown)


@each_decoder
@given(data=st.binary(max_size=300))
def test_bytes_that_are_no_text_are_shown_at_the_end(make_decoder: MakeDecoder, data: bytes) -> None:
    decoder = make_decoder()
    shown = "".join(decoder.push(byte) for byte in data) + decoder.flush()
    assert shown.replace("\ufffd", "") == decode_bytes(data).replace("\ufffd", "")


@given(st.binary(max_size=300), st.binary(max_size=20))
def test_what_bytes_add_is_as_if_decoded_at_once(data: bytes, context: bytes) -> None:
    """Of a prompt that ends within a code point, the output completes it."""
    decoder = ByteDecoder(BYTES, list(context[-8:]))
    shown = "".join(decoder.push(byte) for byte in data) + decoder.flush()
    whole = decode_bytes(context[-8:] + data)
    assert whole.endswith(shown)
    assert decode_bytes(context[-8:]).rstrip("\ufffd").startswith(whole[: len(whole) - len(shown)].rstrip("\ufffd"))


def test_endless_garbage_is_not_held_back() -> None:
    windows: list[int] = []

    def decode(token_ids: Sequence[int]) -> str:
        windows.append(len(token_ids))
        return decode_bytes(token_ids)

    decoder = WindowDecoder(decode)
    shown = "".join(decoder.push(0xFF) for _ in range(10_000))
    assert len(shown) > 9_900
    assert max(windows) <= 128, "each step looks at a short window only"


@pytest.mark.parametrize("start", [b"", b"a", b"\xe2", b"\xff" * 70], ids=["nothing", "text", "half", "garbage"])
def test_tokens_that_are_not_shown_cost_nothing(start: bytes) -> None:
    """An output of special tokens alone, which `ignore_eos` allows: each step looks at a short window all the same."""
    windows: list[int] = []

    def decode(token_ids: Sequence[int]) -> str:
        windows.append(len(token_ids))
        return decode_bytes([token_id for token_id in token_ids if token_id < 256])

    decoder = WindowDecoder(decode)
    shown = "".join(decoder.push(byte) for byte in start)
    shown += "".join(decoder.push(256) for _ in range(3000))
    shown += decoder.push(ord("b")) + decoder.flush()
    assert shown == decode_bytes(start) + "b"
    assert max(windows) <= 65


@given(st.lists(st.tuples(st.sampled_from("▁ab"), st.booleans()), max_size=40))
def test_spaces_that_show_only_between_others_are_kept(tokens: list[tuple[str, bool]]) -> None:
    def decode(token_ids: Sequence[int]) -> str:  # as SentencePiece's, some of whose tokens are special
        return "".join(tokens[i][0] for i in token_ids if not tokens[i][1]).replace("▁", " ").removeprefix(" ")

    decoder = WindowDecoder(decode)
    assert "".join(map(decoder.push, range(len(tokens)))) == decode(range(len(tokens)))


def test_leading_space_follows_the_prompt() -> None:
    words = ["▁The", "▁capital", "▁of"]

    def decode(token_ids: Sequence[int]) -> str:  # as SentencePiece's: the first space of all is dropped
        return "".join(words[i] for i in token_ids).replace("▁", " ")[1:]

    with_context = WindowDecoder(decode, context=[0])
    assert [with_context.push(1), with_context.push(2)] == [" capital", " of"]
    assert WindowDecoder(decode).push(1) == "capital"


@given(st.data(), st.text("abc", max_size=40), st.lists(st.text("abc", min_size=1, max_size=6), max_size=4))
def test_stop_matcher_does_not_depend_on_the_pieces(data: st.DataObject, text: str, stop: list[str]) -> None:
    matcher, shown, rest = StopMatcher(stop), "", text
    while rest and matcher.matched is None:
        size = data.draw(st.integers(1, len(rest)))
        shown += matcher.push(rest[:size])
        rest = rest[size:]
    expected = cut(text, stop)
    assert (matcher.matched is not None) == (expected != text)
    assert shown + ("" if matcher.matched else matcher.flush()) == expected


@given(st.text("ab", max_size=20), st.text("ab", min_size=1, max_size=5))
def test_no_more_is_held_back_than_must_be(text: str, stop: str) -> None:
    matcher = StopMatcher([stop])
    shown = matcher.push(text)
    if matcher.matched is None:
        held = text[len(shown) :]
        assert stop.startswith(held)
        assert not any(stop.startswith(text[i:]) for i in range(len(shown)))


def test_stop_string_can_be_included() -> None:
    matcher = StopMatcher(["END"], include_stop=True)
    assert matcher.push("text EN") + matcher.push("D more") == "text END"


@pytest.fixture(scope="session")
def tokenizer(model_dir: Path) -> Tokenizer:
    return Tokenizer(model_dir)


@given(text=st.text(max_size=60), stop=st.lists(st.text(min_size=1, max_size=3), max_size=2))
def test_detokenizer_with_a_real_vocabulary(tokenizer: Tokenizer, text: str, stop: list[str]) -> None:
    token_ids = tokenizer.encode(text)
    detokenizer = Detokenizer(tokenizer.text_decoder(), stop)
    pieces = [piece for token_id in token_ids for piece in detokenizer.push([token_id])] + detokenizer.flush()
    shown = text_of(pieces)
    assert shown == cut(text, stop)
    if detokenizer.stopped:
        before, after = token_ids[: detokenizer.num_tokens - 1], token_ids[: detokenizer.num_tokens]
        assert cut(text, stop) != text
        assert not any(s in tokenizer.decode(before) for s in stop)
        assert any(s in tokenizer.decode(after) for s in stop)
    else:
        assert detokenizer.num_tokens == len(token_ids)


@given(data=st.data(), skips=st.booleans())
def test_the_text_of_a_real_vocabulary_is_the_decoding_of_all_tokens(
    tokenizer: Tokenizer, data: st.DataObject, skips: bool
) -> None:
    """Special tokens, tokens that are no text, and ids that the vocabulary does not know among them."""
    context, token_ids = (data.draw(st.lists(st.integers(0, 325), max_size=n)) for n in (8, 30))
    decoder = tokenizer.text_decoder(context, skips)
    assert isinstance(decoder, ByteDecoder), "its decoder is ByteLevel alone"
    shown = "".join(map(decoder.push, token_ids)) + decoder.flush()
    whole = tokenizer.decode(context + token_ids, skips)
    assert whole.endswith(shown)
    if not tokenizer.decode(context, skips).endswith("\ufffd"):
        assert whole == tokenizer.decode(context, skips) + shown


def test_added_tokens_are_spelled_as_they_are(model_dir: Path, tmp_path: Path) -> None:
    """The vocabulary's letters stand for bytes, theirs for themselves."""
    shutil.copytree(model_dir, tmp_path / "model")
    added = tokenizers.Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    added.add_tokens(["two words", "\u0120letter"])
    added.add_special_tokens(["<|für|>"])
    added.save(str(tmp_path / "model" / "tokenizer.json"))
    model = Tokenizer(tmp_path / "model")
    token_ids = [added.token_to_id(token) for token in ("two words", "<|für|>", "\u0120letter")]
    for skips in (False, True):
        decoder = model.text_decoder((), skips)
        assert isinstance(decoder, ByteDecoder)
        assert "".join(map(decoder.push, token_ids)) == model.decode(token_ids, skips)


def test_tokens_after_a_stop_string_are_ignored() -> None:
    detokenizer = Detokenizer(WindowDecoder(decode_bytes), ["b"])
    assert text_of(detokenizer.push(b"abcdef")) == "a"
    assert detokenizer.push(b"g") == []
    assert (detokenizer.num_tokens, detokenizer.stopped, detokenizer.flush()) == (2, True, [])


@pytest.mark.parametrize(
    "min_tokens, stop, shown",
    [(3, "c", "abcdef"), (2, "c", "ab"), (3, "bcd", "a"), (3, "bc", "abcdef"), (3, "cd", "ab"), (6, "f", "abcdef")],
)
def test_a_stop_string_counts_where_it_ends(min_tokens: int, stop: str, shown: str) -> None:
    """As vLLM has it: not with the last of the tokens that must come, but one may begin within them."""
    detokenizer = Detokenizer(WindowDecoder(decode_bytes), [stop], min_tokens=min_tokens)
    assert text_of(detokenizer.push(b"abcdef")) + text_of(detokenizer.flush()) == shown


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.integers(0, 8))
def test_text_ends_at_the_first_stop_string_that_counts(text: str, stop: list[str], min_tokens: int) -> None:
    ends = [(end, -len(s)) for s in stop for end in range(min_tokens + 1, len(text) + 1) if text[:end].endswith(s)]
    end, length = min(ends, default=(len(text), 0))
    detokenizer = Detokenizer(WindowDecoder(decode_bytes), stop, min_tokens=min_tokens)
    assert text_of(detokenizer.push(text.encode())) + text_of(detokenizer.flush()) == text[: end + length]


def test_min_tokens_delays_stop_strings() -> None:
    detokenizer = Detokenizer(WindowDecoder(decode_bytes), ["b"], min_tokens=3)
    assert text_of(detokenizer.push(b"abab!")) == "aba"
    assert detokenizer.num_tokens == 4


@given(st.data(), st.text("abé", max_size=30), st.lists(st.text("abé", min_size=1, max_size=4), max_size=2))
def test_pieces_keep_their_tokens(data: st.DataObject, text: str, stop: list[str]) -> None:
    """Cut anywhere, text and tokens say the same, and what came with a token comes out with it."""
    token_ids, detokenizer = list(text.encode()), Detokenizer(WindowDecoder(decode_bytes), stop)
    pieces: list[Piece] = []
    rest = list(enumerate(token_ids))
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        pieces += detokenizer.push([t for _, t in rest[:size]], [f"{n}:{t}" for n, t in rest[:size]])
        rest = rest[size:]
    pieces += detokenizer.flush()
    shown = text_of(pieces)
    kept = [token_id for piece in pieces for token_id in piece.token_ids]
    assert shown == cut(text, stop)
    assert kept == token_ids[: len(shown.encode())]
    assert [logprob for piece in pieces for logprob in piece.logprobs or ()] == [f"{n}:{t}" for n, t in enumerate(kept)]
