"""The example of Envoy Gateway, as it is written: what it would send is believed, and what a client claims is not."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml

from .conftest import Say, Serve, Server
from .policies import samples
from .scripted_core import WAIT_SECONDS

MANIFESTS = Path(__file__).parents[3] / "manifests"
GATEWAY_KEY, CLIENT_KEY = "key-of-the-gateway-0123456789", "key-of-search-0123456789"
CLIENTS = {"search": CLIENT_KEY, "nobody": "key-of-nobody-0123456789"}  # the Secret `clients`


class EnvoyGateway:
    """What Envoy Gateway makes of a request's headers by the objects of the example, in the order of its filters."""

    def __init__(self, documents: list[dict[str, Any]]) -> None:
        self._by_kind = {document["kind"]: document["spec"] for document in documents}
        (rule,) = self._by_kind["HTTPRoute"]["rules"]
        (reference,) = (item["extensionRef"] for item in rule["filters"])
        names = {document["kind"]: document["metadata"]["name"] for document in documents}
        assert reference["name"] == names[reference["kind"]]
        assert self._by_kind["HTTPRouteFilter"]["credentialInjection"]["overwrite"]
        for policy in ("ClientTrafficPolicy", "SecurityPolicy"):
            (target,) = self._by_kind[policy]["targetRefs"]
            assert target["name"] == names[target["kind"]]
        self.port: int = rule["backendRefs"][0]["port"]

    def forward(self, headers: httpx2.Headers) -> httpx2.Headers | None:
        """The headers that the backend gets; None: the gateway answers 401."""
        sent = httpx2.Headers(headers)
        for name in self._by_kind["ClientTrafficPolicy"]["headers"]["earlyRequestHeaders"]["remove"]:
            sent.pop(name, None)
        auth = self._by_kind["SecurityPolicy"]["apiKeyAuth"]
        (name,) = auth["extractFrom"][0]["headers"]
        key = sent.get(name, "").removeprefix("Bearer ")
        client = next((client for client, its_key in CLIENTS.items() if its_key == key), None)
        if client is None:
            return None
        if auth["sanitize"]:
            del sent[name]
        sent[auth["forwardClientIDHeader"]] = client
        injection = self._by_kind["HTTPRouteFilter"]["credentialInjection"]
        sent[injection.get("header", "Authorization")] = f"Bearer {GATEWAY_KEY}"
        return sent


@pytest.fixture
def gateway() -> EnvoyGateway:
    text = (MANIFESTS / "gateways/envoy-gateway.yaml").read_text()
    return EnvoyGateway(list(yaml.safe_load_all(text)))


@pytest.fixture
def server(serve_either: Serve, say: Say, tmp_path: Path) -> Iterator[Server]:
    """With the pool and the policy of the example, and the Secret that they name."""
    policies = shutil.copytree(MANIFESTS / "examples/gateway", tmp_path / "policies")
    secret = {"apiVersion": "v1", "kind": "Secret", "stringData": {"key": GATEWAY_KEY}}
    secret["metadata"] = {"name": "gateway-key", "namespace": "inference"}
    (policies / "secret.yaml").write_text(yaml.safe_dump(secret))
    yield serve_either(say("ok"), policies=policies)


def ask(server: Server, headers: httpx2.Headers) -> httpx2.Response:
    body = {"prompt": "x", "max_tokens": 3}
    return httpx2.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=WAIT_SECONDS)


def num_served(server: Server, tenant_id: str = "search") -> float:
    return sum(
        value
        for name, value in samples(server).items()
        if name.startswith("evenhand_requests_total")
        and f"tenant={tenant_id}" in name
        and "outcome=refused" not in name
    )


CLAIMS = [("X-LLM-D-Inference-Fairness-Id", "search"), ("x-gateway-inference-fairness-id", "search")]


def test_a_client_is_the_tenant_that_the_gateway_says(server: Server, gateway: EnvoyGateway) -> None:
    sent = gateway.forward(httpx2.Headers({"Authorization": f"Bearer {CLIENT_KEY}"}))
    assert sent is not None and CLIENT_KEY not in str(sent.raw)
    assert ask(server, sent).status_code == 200
    assert num_served(server) == 1


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim[0])
def test_what_a_client_claims_is_dropped_at_the_gateway(
    server: Server, gateway: EnvoyGateway, claim: tuple[str, str]
) -> None:
    sent = gateway.forward(httpx2.Headers([("Authorization", f"Bearer {CLIENTS['nobody']}"), claim]))
    assert sent is not None
    answer = ask(server, sent)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "unknown_tenant")
    assert num_served(server) == 0
    assert gateway.forward(httpx2.Headers([("Authorization", "Bearer guessed"), claim])) is None


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim[0])
def test_past_the_gateway_a_claim_is_nothing(server: Server, claim: tuple[str, str]) -> None:
    """With a key that only the gateway knows as one, with none, and with one made up."""
    for key in (CLIENT_KEY, "", "made-up-0123456789-0123456789"):
        fields = [("Authorization", f"Bearer {key}")] if key else []
        assert ask(server, httpx2.Headers([*fields, claim])).status_code == 401
    assert num_served(server) == 0


def test_it_leads_to_the_service_of_the_engines(gateway: EnvoyGateway) -> None:
    service = yaml.safe_load((MANIFESTS / "base/engine/service.yaml").read_text())
    assert gateway.port in [port["port"] for port in service["spec"]["ports"]]
