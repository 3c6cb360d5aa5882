"""A large body: read by its skeleton as it would be read whole, passed on as it came, and never looked at in one go."""

import gzip
import json
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest

from evenhand_engine.errors import Refusal
from evenhand_engine.sidecar import skeleton as skeletons
from evenhand_engine.sidecar.body import Body
from evenhand_engine.sidecar.intake import Intake
from evenhand_engine.sidecar.skeleton import Skeleton

from .conftest import ScriptedUpstream, Sidecar, event, say_three

PICTURE = "data:image/png;base64," + "iVBORw0KGgo+/A" * 150_000
TEXT = 'one "word", \\ and {another}:\n' * 80_000
WORDS = "words and words " * 100_000


def take(raw: bytes, rng: random.Random | None = None) -> Body:
    """The body, as it comes in pieces of whatever size."""
    intake = Intake(says_json=True)
    start = 0
    while start < len(raw):
        length = 100_000 if rng is None else rng.choice([1, 7, 4096, 65_536, 200_000])
        intake.take(raw[start : start + length])
        start += length
    return intake.body()


def chat(*contents: Any, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content} for content in contents], **fields}


BODIES = {
    "picture": chat([{"type": "image_url", "image_url": {"url": PICTURE}}, {"type": "text", "text": "What is this?"}]),
    "text": {"prompt": TEXT, "user": "me", "stream": True},
    "words": {"prompt": [WORDS, "", WORDS], "n": 3, "priority": 7, "stream_options": {"a": 1}},
    "unicode": {"prompt": "häßlich, 日本語 🙂 " * 60_000},
    "token ids": {"prompt": list(range(200_000))},
    "long user": {"prompt": "x", "user": WORDS, "metadata": {"user_id": WORDS}},
    "numbers as text": {"prompt": WORDS, "max_tokens": "5" + " " * 20_000, "n": "2", "sampling_params": {"n": 4, "x": WORDS}},
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("is_ascii", [True, False])
def test_the_skeleton_of_a_body_is_read_as_the_whole(name: str, is_ascii: bool) -> None:
    raw = json.dumps(BODIES[name], ensure_ascii=is_ascii, separators=(",", ":")).encode()
    assert len(raw) > 2**20
    whole, body = Body(raw), take(raw, random.Random(name))
    names = ("num_bytes", "size", "num_prompts", "num_choices", "num_token_ids", "is_stream", "user", "priority")
    assert {name: getattr(body, name) for name in names} == {name: getattr(whole, name) for name in names}
    assert body.max_output_tokens("/v1/chat/completions") == whole.max_output_tokens("/v1/chat/completions")
    assert b"".join(body.encode()) == raw
    for one in (whole, body):
        one.set("priority", 3)
        one.limit_outputs("/v1/chat/completions", 9)
    assert b"".join(body.encode()) == b"".join(whole.encode())


def test_what_is_looked_at_in_one_go_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its size: blocks as they come, and at the end what is left of them."""
    blocks: list[int] = []
    take_block = Skeleton._take_block

    def note(skeleton: Skeleton, block: bytes) -> None:
        blocks.append(len(block))
        take_block(skeleton, block)

    monkeypatch.setattr(Skeleton, "_take_block", note)
    raw = json.dumps(chat("data:image/png;base64," + "Ab+/" * 2**21, TEXT)).encode()
    body = take(raw)
    assert max(blocks) <= 4096 and sum(blocks) == len(raw)
    assert len(body._raw) < len(raw) / 3  # half of a text with so many escapes is left, of a picture a hundredth
    assert max(map(len, body.encode())) <= 100_000


def test_white_space_is_no_text() -> None:
    raw = b'{"prompt":  [1,2' + b" \n" * 2**20 + b',3], "n": 2}'
    body = take(raw)
    assert (body.num_token_ids, body.num_choices, len(body._raw) < 2**14) == (3, 2, True)
    assert b"".join(body.encode()) == raw


LONG = b"x" * 2**21


@pytest.mark.parametrize(
    "raw",
    [
        b'{"prompt":"' + LONG,
        b'{"prompt":"' + LONG + b'"',
        b'{"prompt":' + LONG + b"}",
        b'{"prompt":"' + LONG + b"\n" + LONG + b'"}',
        b'{"prompt":"' + LONG + b"\\x" + LONG + b'"}',
        b'{"prompt":"' + LONG + b"\\ud800" + LONG + b'"}',
        b'{"prompt":"' + b"\\\\" * 300_000 + b'\\"}' + LONG,
        b'{"prompt":[1' + b" " * 2**21 + b"2]}",
        b'{"prompt":NaN,"x":"' + LONG + b'"}',
        b'\xef\xbb\xbf{"x":"' + LONG + b'"}',
        b'{"x":"' + LONG + b'"} {}',
    ],
    ids=range(11),
)
def test_what_is_no_json_is_none_however_large(raw: bytes) -> None:
    with pytest.raises(Refusal) as refused:
        take(raw)
    assert refused.value.code == "invalid_json"


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b'{"prompt":[' + b'"",' * 400_000 + b'""]}', 200),
        (b'{"junk":[' + b"[]," * 500_000 + b"1]}", 400),
        (b'{"prompt":"' + b"\\n" * 900_000 + b'"}', 400),
        (b'{"junk":' + b"[" * 2**21, 400),
        (b'{"prompt":[' + (b'"' + b"word " * 700 + b'",') * 3000 + b'""]}', 413),
    ],
)
def test_more_than_may_be_read_in_one_go_is_refused(raw: bytes, status: int) -> None:
    if status == 200:
        assert take(raw).num_prompts == 400_001
        return
    with pytest.raises(Refusal) as refused:
        take(raw)
    assert refused.value.status == status


@pytest.mark.parametrize("seed", range(40))
def test_any_text_is_found_again(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strings of all kinds of characters and escapes, cut wherever pieces and blocks happen to end."""
    monkeypatch.setattr(skeletons, "_BLOCK_BYTES", 64)
    monkeypatch.setattr(skeletons, "_STEP_BYTES", 256)
    monkeypatch.setattr(skeletons, "_SHOWN_BYTES", 16)
    monkeypatch.setattr(skeletons, "_CUTS", range(0, 32, 3))
    rng = random.Random(seed)
    units = ["a", "word ", "\\", '"', "\n", "é", "日", "🙂", "\t", "{", "]", ","]
    value = ["".join(rng.choices(units[: rng.choice([2, 4, len(units)])], k=rng.randrange(600))) for _ in range(20)]
    raw = json.dumps(
        {"a": value, "b": {"c": value[::-1]}}, ensure_ascii=seed % 2 == 0, indent=rng.choice([None, 70])
    ).encode()
    skeleton = Skeleton()
    start = 0
    while start < len(raw):
        length = rng.randrange(1, 400)
        skeleton.feed(raw[start : start + length])
        start += length
    skeleton.complete()
    assert json.loads(b"".join(skeleton.expand(skeleton.text))) == json.loads(raw)
    assert skeleton.size(skeleton.text) <= len(raw)
    json.loads(skeleton.text)  # it is one itself


async def test_a_large_body_goes_on_in_pieces(upstream: ScriptedUpstream, sidecar: Sidecar) -> None:
    """With its length, as engines want it; from a client that packs it and says no length, too."""
    upstream.script = say_three
    content = [{"type": "image_url", "image_url": {"url": PICTURE * 8}}]
    fields = chat(content, priority=1, stream=True)
    packed = {"Content-Encoding": "gzip", "Content-Type": "application/json"}

    async def chunks(data: bytes) -> AsyncIterator[bytes]:
        yield data

    raw = json.dumps(fields).encode()
    for data, headers in ((raw, {"Content-Length": str(len(raw))}), (gzip.compress(raw), packed)):
        async with sidecar.session.post(
            sidecar.url + "/v1/chat/completions", data=chunks(data), headers=headers
        ) as response:
            assert (response.status, (await response.read()).count(event())) == (200, 3)
        _, received, sent = upstream.received[-1]
        assert received["Content-Length"] == str(len(sent)) and "Content-Encoding" not in received
        assert json.loads(sent) == {**chat(content, stream=True), "stream_options": {"include_usage": True}}
    await sidecar.settled()
