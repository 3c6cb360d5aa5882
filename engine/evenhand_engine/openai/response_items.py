"""ResponseItems: the output of a response as items (reasoning, a message, calls), and the events that tell how they grow."""

import secrets
from typing import Any

from evenhand_engine.openai.events import Event

_PARTS = {"reasoning": "reasoning_text", "message": "output_text"}
_IDS = {"reasoning": "rs", "message": "msg", "function_call": "fc"}


class ResponseItems:
    """Fed with the deltas of one chat message.

    Attributes:
        items: that have begun, the last one perhaps still open.
    """

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._is_open = False

    def take(self, delta: dict[str, Any]) -> list[Event]:
        """What a delta of the message changes."""
        events: list[Event] = []
        for kind, text in (("reasoning", delta.get("reasoning")), ("message", delta.get("content"))):
            if text:
                events += self._grow_text(kind, text)
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                events += self._begin("function_call", call_id=call["id"], name=call["function"]["name"], arguments="")
            if arguments := call["function"]["arguments"]:
                self.items[-1]["arguments"] += arguments
                events.append(self._event("response.function_call_arguments.delta", delta=arguments))
        return events

    def end(self, status: str = "completed") -> list[Event]:
        """The last item has ended too: `completed`, or `incomplete`."""
        if not self._is_open:
            return []
        self._is_open = False
        item = self.items[-1]
        item["status"] = status
        if item["type"] == "function_call":
            done = self._event("response.function_call_arguments.done", arguments=item["arguments"], name=item["name"])
            return [done, self._item_event("response.output_item.done")]
        (part,) = item["content"]
        kind, text = part["type"], part["text"]
        logprobs: dict[str, Any] = {"logprobs": []} if kind == "output_text" else {}
        return [
            self._part_event(f"response.{kind}.done", text=text, **logprobs),
            self._part_event("response.content_part.done", part=dict(part)),
            self._item_event("response.output_item.done"),
        ]

    def _grow_text(self, item_type: str, text: str) -> list[Event]:
        events: list[Event] = []
        kind = _PARTS[item_type]
        if not self._is_open or self.items[-1]["type"] != item_type:
            more: dict[str, Any] = {"role": "assistant"} if item_type == "message" else {"summary": []}
            events += self._begin(item_type, content=[], **more)
            annotations: dict[str, Any] = {"annotations": [], "logprobs": []} if item_type == "message" else {}
            part = {"type": kind, "text": "", **annotations}
            events.append(self._part_event("response.content_part.added", part=dict(part)))
            self.items[-1]["content"].append(part)
        self.items[-1]["content"][0]["text"] += text
        logprobs: dict[str, Any] = {"logprobs": []} if item_type == "message" else {}
        return [*events, self._part_event(f"response.{kind}.delta", delta=text, **logprobs)]

    def _begin(self, item_type: str, **fields: Any) -> list[Event]:
        events = self.end()
        item_id = f"{_IDS[item_type]}_{secrets.token_hex(12)}"
        self.items.append({"id": item_id, "type": item_type, "status": "in_progress", **fields})
        self._is_open = True
        return [*events, self._item_event("response.output_item.added")]

    def _item_event(self, name: str) -> Event:
        item = dict(self.items[-1])
        if "content" in item:
            item["content"] = [dict(part) for part in item["content"]]
        return {"type": name, "output_index": len(self.items) - 1, "item": item}

    def _part_event(self, event_type: str, **fields: Any) -> Event:
        return self._event(event_type, content_index=0, **fields)

    def _event(self, event_type: str, **fields: Any) -> Event:
        return {"type": event_type, "item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, **fields}
