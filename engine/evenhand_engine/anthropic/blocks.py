"""Blocks: the content of a message (thinking, text, uses of tools), and the events that tell how it grows."""

from typing import Any

import msgspec

from evenhand_engine.openai.events import Event


class Blocks:
    """Fed with the deltas of one chat message."""

    def __init__(self) -> None:
        self._blocks: list[dict[str, Any]] = []
        self._is_open = False

    def content(self) -> list[dict[str, Any]]:
        """All blocks; the input of a tool whose JSON was cut off is empty."""
        return [_whole(block) for block in self._blocks]

    def take(self, delta: dict[str, Any]) -> list[Event]:
        """What a delta of the message changes."""
        events: list[Event] = []
        if thinking := delta.get("reasoning"):
            events += self._grow({"type": "thinking", "thinking": "", "signature": ""}, "thinking", thinking)
        if text := delta.get("content"):
            events += self._grow({"type": "text", "text": ""}, "text", text)
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                block = {"type": "tool_use", "id": call["id"], "name": call["function"]["name"], "input": {}}
                events += self._begin(block)
                self._blocks[-1]["input"] = ""
            if part := call["function"]["arguments"]:
                self._blocks[-1]["input"] += part
                events.append(self._delta({"type": "input_json_delta", "partial_json": part}))
        return events

    def end(self) -> list[Event]:
        """The last block has ended too."""
        is_open, self._is_open = self._is_open, False
        return [{"type": "content_block_stop", "index": len(self._blocks) - 1}] if is_open else []

    def _grow(self, block: dict[str, Any], kind: str, text: str) -> list[Event]:
        is_same = self._is_open and self._blocks[-1]["type"] == block["type"]
        events = [] if is_same else self._begin(block)
        self._blocks[-1][kind] += text
        return [*events, self._delta({"type": f"{kind}_delta", kind: text})]

    def _begin(self, block: dict[str, Any]) -> list[Event]:
        events = self.end()
        self._blocks.append(dict(block))
        self._is_open = True
        return [*events, {"type": "content_block_start", "index": len(self._blocks) - 1, "content_block": block}]

    def _delta(self, delta: dict[str, Any]) -> Event:
        return {"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": delta}


def _whole(block: dict[str, Any]) -> dict[str, Any]:
    if block["type"] != "tool_use":
        return block
    try:
        return {**block, "input": msgspec.json.decode(block["input"] or "{}", type=dict[str, Any])}
    except msgspec.DecodeError:
        return {**block, "input": {}}
