"""Pages of other origins: none, unless they are named."""

import httpx2
import pytest

from .conftest import Say, Serve

PAGE = "https://chat.example.com"
ASKS = {
    "Origin": PAGE,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type",
}


@pytest.mark.parametrize("allowed", [PAGE, "*"])
def test_a_page_of_an_allowed_origin(serve: Serve, say: Say, allowed: str) -> None:
    server = serve(say("ok"), allowed_origins=("https://other.example.com", allowed), api_key="k")
    preflight = httpx2.options(f"{server.url}/v1/chat/completions", headers=ASKS)
    assert (preflight.status_code, preflight.content) == (204, b""), "without the credential, which comes later"
    assert preflight.headers["Access-Control-Allow-Origin"] == PAGE
    assert "POST" in preflight.headers["Access-Control-Allow-Methods"]
    assert preflight.headers["Access-Control-Allow-Headers"] == "authorization,content-type"
    headers = {"Origin": PAGE, "Authorization": "Bearer k"}
    answer = httpx2.post(f"{server.url}/v1/completions", json={"prompt": "x"}, headers=headers)
    assert answer.status_code == 200 and answer.headers["Access-Control-Allow-Origin"] == PAGE
    refused = httpx2.post(f"{server.url}/v1/completions", json={"prompt": "x"}, headers={"Origin": PAGE})
    assert refused.status_code == 401 and refused.headers["Access-Control-Allow-Origin"] == PAGE
    assert "Retry-After" in refused.headers["Access-Control-Expose-Headers"]
    assert httpx2.get(f"{server.url}/health").headers["Vary"] == "Origin", "so that no cache gives it to another page"


@pytest.mark.parametrize("allowed", [(), ("https://other.example.com",)])
def test_no_other_page(serve: Serve, say: Say, allowed: tuple[str, ...]) -> None:
    server = serve(say("ok"), allowed_origins=allowed)
    assert httpx2.options(f"{server.url}/v1/chat/completions", headers=ASKS).status_code == 405
    answer = httpx2.get(f"{server.url}/v1/models", headers={"Origin": PAGE})
    assert answer.status_code == 200 and "Access-Control-Allow-Origin" not in answer.headers
