"""Bodies read as the most that an engine may make of them: limits, answers, prompts, pictures, users."""

import json
from typing import Any

import pytest

from evenhand_engine.errors import Refusal
from evenhand_engine.sidecar.body import MAX_CHOICES, Body, BytesPerToken


def body(**fields: Any) -> Body:
    return Body(json.dumps(fields).encode())


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"prompt": "a"}, 1),
        ({"prompt": [1, 2, 3], "n": 3}, 3),
        ({"prompt": [[1, 2], [3]], "n": 2}, 4),
        ({"prompt": ["a", "b, [\"c\"", "\\"]}, 3),
        ({"prompt": [["a", "b"], "c"]}, 4),
        ({"prompt": [12, "one prompt of two kinds"]}, 1),
        ({"prompt": None, "input_ids": [[1], [2]]}, 2),
        ({"messages": [], "n": "5"}, 5),
        ({"messages": [], "n": 1, "best_of": 4.0}, 4),
        ({"messages": [], "n": -3}, 1),
        ({"text": "a", "sampling_params": {"n": 3}}, 3),
        ({"text": ["a", "b"], "n": 2, "sampling_params": [{"n": 3}, {"n": "4"}]}, 8),
        ({"text": "a", "sampling_params": [{"n": 3}, 7]}, 1),
        ({"inputs": "a", "parameters": {"best_of": 5}}, 5),
        ({"instances": [{"text": "a"}, {"text": "b"}], "parameters": {}}, 2),
        ({"token_ids": [1, 2, 3], "sampling_params": {"n": 2}}, 2),
    ],
)  # fmt: skip
def test_every_answer_that_is_asked_for_counts(fields: dict[str, Any], expected: int) -> None:
    assert body(**fields).num_choices == expected


def test_many_prompts_are_counted_quickly() -> None:
    """Once through each: as many steps for each prompt as there are prompts would not end."""
    for prompt in (b'"' + rb"\"" * 2**22 + b'"', b'"a",' * 2**21 + b'"a"', b"[]," * 2**21 + b"[]"):
        raw = b'{"prompt":[' + prompt + b"]}"
        assert (Body(raw).num_prompts > MAX_CHOICES) == (prompt[1:2] != b"\\")


def test_what_is_no_json_may_pass_as_it_is() -> None:
    assert Body(b"RIFF", is_json=False).fields is None
    assert Body(b"").fields is None and Body(b" [1] ").fields is None
    with pytest.raises(Refusal):
        Body(b"RIFF")


def test_nobody_is_believed_to_be_sparse_for_long() -> None:
    """Else long prompts pass for short by what was learned of bodies made to be sparse, and whoever leaves early pays that."""
    ratios = BytesPerToken()
    for _ in range(200):
        ratios.learn("a", 64_000, 10)
    assert 3_900 < ratios.estimate("a", 32_000) < 4_100
    for _ in range(5):
        ratios.learn("a", 32_000, 8_000)
    assert ratios.estimate("a", 32_000) > 7_000
    assert ratios.estimate("b", 32_000) == 8_000


def test_pictures_are_no_text() -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 160_000}}
    assert 10_000 < body(messages=[{"role": "user", "content": [part]}]).size < 10_400
    assert body(messages=[{"role": "user", "content": "data:image/png;base64," + "A" * 160_000}]).size > 160_000
    sound = {"type": "input_audio", "input_audio": {"data": "A" * 1_600, "format": "wav"}}
    assert body(messages=[{"role": "user", "content": [sound]}]).size < 300


def test_users_are_told_apart_in_both_vendors_words() -> None:
    assert body(user="u", metadata={"user_id": "v"}).user == "u"
    assert body(metadata={"user_id": "v"}).user == "v"
    assert body(metadata={"user_id": 5}).user == body(metadata=[1]).user == ""


@pytest.mark.parametrize("start", [b"{", b'{"messages":[],"sampling_params":{'])
def test_an_object_of_very_many_members_is_refused_undecoded(start: bytes) -> None:
    """Three million of them would take 500 MB and seconds, for each body."""
    raw = start + b",".join(b'"%d":1' % number for number in range(20_000)) + b"}" * start.count(b"{")
    with pytest.raises(Refusal, match="more than 16384 members"):
        Body(raw).num_choices  # noqa: B018


def test_what_is_inside_of_a_prompt_is_no_member() -> None:
    fields = {"messages": [{"role": "user", "content": ":" * 90_000}] * 3, "tools": [{"a": 1}] * 20_000, "n": 2}
    assert body(**fields).num_choices == 2
