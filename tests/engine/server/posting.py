"""Bodies as they are sent, and errors as they come back."""

import http.client
import json
import urllib.parse
from typing import Any

from .conftest import Server


def post(
    server: Server, path: str, body: bytes | dict[str, Any], headers: dict[str, str] | None = None
) -> tuple[int, dict[str, Any], dict[str, str]]:
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(server.url).netloc, timeout=120)
    try:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", path, data, {"Content-Type": "application/json", **(headers or {})})
        response = connection.getresponse()
        return response.status, json.loads(response.read()), dict(response.getheaders())
    finally:
        connection.close()


def error(server: Server, path: str, body: bytes | dict[str, Any]) -> tuple[int, dict[str, Any]]:
    status, answer, headers = post(server, path, body)
    assert answer.keys() == {"error"}
    assert answer["error"].keys() == {"message", "type", "param", "code"}
    assert answer["error"]["message"]
    assert headers["X-Evenhand-Reason"] == answer["error"]["code"]
    return status, answer["error"]


COMPLETION = {"model": "tiny", "prompt": "x"}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}
