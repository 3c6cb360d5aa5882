"""Bodies of every shape that is dear to read, for bodies.py."""

import json

CONTEXT = 131072
LARGE_CONTEXT = 2**20
MOST_IDS = 790_000  # a body with more commas is refused


def _many(element: str, size: int) -> str:
    return "[" + ",".join([element] * (size // (len(element) + 1))) + "]"


def fitting(size: int, context: int) -> dict[str, tuple[str, bytes]]:
    """Path and body by what is in it. A token of the vocabulary is a byte, so text that fits is as long as the context."""
    fits = min(size, context - 64)
    texts = {
        "text that fits": '{"prompt":"' + "word " * (fits // 5) + '"}',
        "token ids that fit": '{"prompt":' + _many("97", 3 * min(fits, MOST_IDS)) + "}",
    }
    return {name: ("/v1/completions", text.encode()) for name, text in texts.items()}


def shapes(size: int) -> dict[str, tuple[str, bytes]]:
    fits = min(size, CONTEXT - 64)
    texts = {
        "text": '{"prompt":"' + "word " * (size // 5) + '"}',
        "token ids": '{"prompt":' + _many("97", size) + "}",
        "text that is cut": f'{{"truncate_prompt_tokens":{fits},"prompt":"' + "word " * (size // 5) + '"}',
        "short texts": '{"prompt":' + _many('""', size) + "}",
        "unknown member": '{"prompt":"x","junk":' + _many("[]", size) + "}",
        "unsupported member": '{"prompt":"x","documents":' + _many("{}", size) + "}",
        "stop strings": '{"prompt":"x","stop":' + _many('"a"', size) + "}",
        "logit bias": '{"prompt":"x","logit_bias":{' + ",".join(f'"{n}":1' for n in range(size // 12)) + "}}",
        "white space": '{"prompt":"x"' + " " * size + "}",
        "nesting": '{"prompt":"x","junk":' + "[" * size,
    }
    chats = {
        "messages": '{"messages":' + _many('{"role":"u"}', size) + "}",
        "parts": '{"messages":[{"role":"u","content":' + _many('{"type":"text","text":""}', size) + "}]}",
        "tool calls": '{"messages":[{"role":"u","tool_calls":' + _many("{}", size) + "}]}",
        "tools": '{"messages":[{"role":"u"}],"tools":' + _many("{}", size) + "}",
        "schema": '{"messages":[{"role":"u"}],"response_format":{"a":' + _many("{}", size) + "}}",
    }
    found = {name: ("/v1/completions", text.encode()) for name, text in texts.items()}
    found |= {name: ("/v1/chat/completions", text.encode()) for name, text in chats.items()}
    return fitting(size, CONTEXT) | found


def large_shapes(size: int) -> dict[str, tuple[str, bytes]]:
    """What a sidecar passes on: pictures and texts as large as allowed, and the same shapes."""
    url = "data:image/png;base64," + "iVBORw0K" * (size // 8)
    part = {"type": "image_url", "image_url": {"url": url}}
    picture = {"messages": [{"role": "user", "content": [part]}], "priority": 1, "stream": True}
    lines = {"prompt": "a line of text with no quotes\n" * (size // 31), "stream": True}
    found = {
        "picture": json.dumps(picture),
        "lines": json.dumps(lines),
        "unicode": json.dumps({"prompt": "\u00e9" * (size // 6)}),
    }
    return {name: ("/v1/chat/completions", text.encode()) for name, text in found.items()} | shapes(size)
