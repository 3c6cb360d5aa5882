"""Events of a stream are alike but for their text, whichever of them is the first to be written."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from evenhand_engine.frontend.event_writer import TextWriter
from evenhand_engine.messages import AddRequest
from evenhand_engine.scheduler.request import RequestOutput, TokenLogprobs
from evenhand_engine.text.tokenizer import Tokenizer

from .conftest import Serve, connect
from .posting import CHAT, COMPLETION
from .test_faults import post

USAGE = {"stream_options": {"include_usage": True}}
CONTINUOUS = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
TEXT = 'A "\\" \n\0<'


def streamed(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        if line.startswith(b"data: {"):
            yield json.loads(line[6:])


def text_of(event: dict[str, Any]) -> str:
    (choice,) = event["choices"]
    return str(choice["text"] if "text" in choice else choice["delta"].get("content", ""))


def shape(value: Any) -> Any:
    """Names, at any depth, and what is null."""
    if isinstance(value, dict):
        return {name: shape(part) for name, part in value.items()}
    return [shape(part) for part in value] if isinstance(value, list) else value is None


@pytest.mark.parametrize("fields", [{}, USAGE, CONTINUOUS, {"return_token_ids": True}, {"logprobs": 0}], ids=str)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_all_are_alike(
    serve: Serve, model_dir: Path, monkeypatch: pytest.MonkeyPatch, path: str, fields: dict[str, Any]
) -> None:
    """Each is read before the next token comes, so that none brings two. The second time, tokens' texts are known."""
    write, written = TextWriter.write, list[str]()
    monkeypatch.setattr(TextWriter, "write", lambda writer, text: (written.append(text), write(writer, text))[1])
    server, is_chat = serve(), path != "/v1/completions"
    body = (CHAT if is_chat else COMPLETION) | fields | {"stream": True, "max_tokens": 60}
    told: tuple[TokenLogprobs, ...] = ()
    if "logprobs" in fields:
        body |= {"logprobs": True} if is_chat else {}
        told = (TokenLogprobs(-0.5, 1),)
    token_ids = Tokenizer(model_dir).encode(TEXT) * 2
    found: list[dict[str, Any]] = []
    with connect(server) as connection, connection.makefile("rb") as lines:
        connection.sendall(post(path, json.dumps(body).encode()))
        request_id, events = server.core.expect(AddRequest).request_id, streamed(lines)
        for token_id in token_ids:
            server.core.output(RequestOutput(request_id=request_id, token_ids=(token_id,), logprobs=told))
            found.append(next(event for event in events if text_of(event)))
    assert "".join(map(text_of, found)) == TEXT * 2 and len(found) > 6
    assert "".join(written[-len(token_ids) // 2 :]) == ("" if fields not in ({}, USAGE) else TEXT)
    assert all(shape(event) == shape(found[0]) for event in found)
    assert {(event["id"], event["choices"][0]["index"]) for event in found} == {(found[0]["id"], 0)}
    if fields == CONTINUOUS:
        assert [event["usage"]["completion_tokens"] for event in found] == list(range(1, len(found) + 1))
    if "return_token_ids" in fields:
        assert [token for event in found for token in event["choices"][0]["token_ids"]] == token_ids
