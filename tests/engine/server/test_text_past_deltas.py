"""Text that depends on no other token goes past deltas, and only that."""

from array import array
from typing import Any, cast

import pytest

from evenhand_engine.backends.backend import GenerationRequest
from evenhand_engine.frontend.claims import Claim
from evenhand_engine.frontend.engine_service import EngineService
from evenhand_engine.openai.generation import Generation
from evenhand_engine.scheduler.request import SamplingParams
from evenhand_engine.text.detokenizer import Detokenizer
from evenhand_engine.text.text_decoder import ByteDecoder, WindowDecoder

from .test_deltas import LETTERS, Quiet, Reader, Scripted, begun, reading


async def test_a_reader_whom_another_choice_has_filled_is_given_no_text() -> None:
    (scripted, deltas), reader = begun(2), Reader(room=2)
    async with reading(deltas, reader) as task:
        scripted.say(0, "a")
        deltas.pass_text(0, lambda text: pytest.fail("it is full"))
        scripted.say(1, "A")
        scripted.say(0, "b")
        assert await task is True
    assert reader.taken == [(0, "a"), (1, "A")]


async def test_what_is_hidden_is_not_said_either() -> None:
    scripted = Scripted()
    request = GenerationRequest(
        request_id="0",
        tenant_id="t",
        prompt_token_ids=array("I", [1]),
        sampling_params=SamplingParams(max_tokens=1),
        arrival_time=0.0,
    )
    backend: Any = scripted
    generation = Generation(cast(EngineService, backend), request, cast(Claim, Quiet()), is_hidden=True)
    generation.begin()
    generation.pass_text(lambda text: pytest.fail("it is hidden"))
    scripted.say(0, "a")
    delta = generation.take()
    assert delta is not None and delta.pieces == ()


def test_spellings_are_told_while_a_text_depends_on_no_other_token() -> None:
    plain = Detokenizer(ByteDecoder(LETTERS))
    assert plain.spellings is LETTERS
    for token_ids, spellings in (([97], LETTERS), ([0xC3], None), ([0xA9], LETTERS)):
        plain.push(token_ids)
        assert plain.spellings is spellings, token_ids
    assert Detokenizer(ByteDecoder(LETTERS, [0xC3])).spellings is None, "the prompt ends within a code point"
    assert Detokenizer(ByteDecoder(LETTERS), ["stop"]).spellings is None
    assert Detokenizer(WindowDecoder(bytes_of_letters)).spellings is None


def test_spellings_are_not_told_while_a_token_waits_for_the_text_of_the_next() -> None:
    """Which is told together with its token."""
    text = Detokenizer(ByteDecoder({1: "", 2: "a"}))
    assert text.push([1]) == [] and text.spellings is None
    (piece,) = text.push([2])
    assert (piece.text, list(piece.token_ids)) == ("a", [1, 2])
    assert text.spellings is not None


def bytes_of_letters(token_ids: Any) -> str:
    return bytes(token_ids).decode("utf-8", "replace")
