"""A tenant is proved, never claimed."""

import base64
import hmac
import json
import time
from typing import Any

import jwt
import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from multidict import CIMultiDict, CIMultiDictProxy

from evenhand_engine.errors import Refusal
from evenhand_engine.frontend.auth import Authenticator
from evenhand_policy.config import (
    DEFAULT_TENANT_ID,
    Gateway,
    SchedulerConfig,
    ServiceAccountIssuer,
    TenantConfig,
    UnknownTenantAction,
    UnknownTenants,
)
from evenhand_policy.credentials import key_hash

KEY, OTHER_KEY, GATEWAY_KEY = "k" * 24, "o" * 24, "g" * 24
ISSUER, AUDIENCE = "https://cluster.example", "evenhand"
SUBJECT = "system:serviceaccount:chat:frontend"
SIGNING_KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
STRANGERS_KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)


def public_jwk(key: rsa.RSAPrivateKey, **fields: str) -> dict[str, Any]:
    jwk: dict[str, Any] = json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(key.public_key()))
    return {k: v for k, v in jwk.items() if isinstance(v, str)} | {"kid": "one", "use": "sig", "alg": "RS256"} | fields


def config(reject: bool = False, jwk: dict[str, Any] | None = None) -> SchedulerConfig:
    return SchedulerConfig(
        tenants=(
            TenantConfig(tenant_id="chat", key_hashes=(key_hash(KEY),), service_accounts=(SUBJECT,)),
            TenantConfig(tenant_id="batch", key_hashes=(key_hash(OTHER_KEY),), header_values=("batch",)),
        ),
        gateway=Gateway(key_hashes=(key_hash(GATEWAY_KEY),), tenant_header="x-team"),
        service_accounts=ServiceAccountIssuer(
            issuer=ISSUER, audience=AUDIENCE, jwks={"keys": [jwk or public_jwk(SIGNING_KEY)]}
        ),
        unknown_tenants=UnknownTenants(action=UnknownTenantAction.REJECT if reject else UnknownTenantAction.SHARE),
    )


def headers(*pairs: tuple[str, str], bearer: str | None = None) -> CIMultiDictProxy[str]:
    fields = CIMultiDict(pairs)
    if bearer is not None:
        fields["Authorization"] = f"Bearer {bearer}"
    return CIMultiDictProxy(fields)


def token(key: Any = SIGNING_KEY, algorithm: str = "RS256", kid: str | None = "one", **claims: Any) -> str:
    content = {"iss": ISSUER, "aud": [AUDIENCE], "sub": SUBJECT, "exp": time.time() + 600} | claims
    content = {name: value for name, value in content.items() if value is not None}
    return jwt.encode(content, key, algorithm=algorithm, headers=None if kid is None else {"kid": kid})


def refused(authenticator: Authenticator, fields: CIMultiDictProxy[str]) -> Refusal:
    with pytest.raises(Refusal) as caught:
        authenticator.authenticate(fields)
    return caught.value


def assert_invalid(authenticator: Authenticator, bad: str) -> None:
    refusal = refused(authenticator, headers(bearer=bad))
    assert (refusal.status, refusal.code) == (401, "invalid_api_key")
    assert bad not in refusal.message


@pytest.fixture
def authenticator() -> Authenticator:
    return Authenticator(config())


def test_api_key(authenticator: Authenticator) -> None:
    assert authenticator.authenticate(headers(bearer=KEY)) == "chat"
    assert authenticator.authenticate(headers(("AUTHORIZATION", f"bearer  {OTHER_KEY}"))) == "batch"


def test_the_header_of_anthropics_clients(authenticator: Authenticator) -> None:
    assert authenticator.authenticate(headers(("X-Api-Key", KEY))) == "chat"
    assert authenticator.authenticate(headers(("x-api-key", GATEWAY_KEY), ("X-Team", "batch"))) == "batch"
    assert authenticator.authenticate(headers(("x-api-key", ""))) == DEFAULT_TENANT_ID
    assert authenticator.authenticate(headers(("x-api-key", KEY), bearer=OTHER_KEY)) == "batch"
    assert refused(authenticator, headers(("x-api-key", KEY), bearer="nonsense")).status == 401
    assert refused(authenticator, headers(("x-api-key", "nonsense"))).status == 401
    assert refused(authenticator, headers(("x-api-key", KEY), ("x-api-key", KEY))).status == 400
    assert Authenticator(SchedulerConfig()).authenticate(headers(("x-api-key", "any"))) == DEFAULT_TENANT_ID


@pytest.mark.parametrize("value", ["Bearer nonsense", "Bearer", "Basic " + KEY, KEY, "Bearer " + key_hash(KEY), "x"])
def test_unknown_credential_is_a_401(authenticator: Authenticator, value: str) -> None:
    refusal = refused(authenticator, headers(("Authorization", value)))
    assert (refusal.status, refusal.code) == (401, "invalid_api_key")
    assert KEY not in refusal.message


def test_no_credential(authenticator: Authenticator) -> None:
    assert authenticator.authenticate(headers()) == DEFAULT_TENANT_ID
    assert refused(Authenticator(config(), anonymous=False), headers()).status == 401
    assert refused(Authenticator(config(reject=True)), headers()).status == 401


def test_every_account_of_a_namespace_but_those_that_are_claimed_by_name() -> None:
    whole = TenantConfig(tenant_id="whole-chat", service_accounts=("system:serviceaccounts:chat",))
    known = config(reject=True)
    authenticator = Authenticator(msgspec.structs.replace(known, tenants=(*known.tenants, whole)))
    account = "system:serviceaccount:{}:{}".format
    assert authenticator.authenticate(headers(bearer=token(sub=account("chat", "worker")))) == "whole-chat"
    assert authenticator.authenticate(headers(bearer=token())) == "chat"
    for other in (account("chats", "worker"), account("other", "chat"), "system:serviceaccounts:chat:x", "chat"):
        assert refused(authenticator, headers(bearer=token(sub=other))).code == "unknown_tenant", other


def test_account_that_is_made_again_by_a_name_that_is_claimed_with_a_uid_is_nobodys() -> None:
    uid, again = "0f7cdb7e-4b5a-4f4e-8f52-3f7d2f1d9c11", "11111111-4b5a-4f4e-8f52-3f7d2f1d9c11"
    known = config(reject=True)
    chat = TenantConfig(tenant_id="chat", service_accounts=(f"{SUBJECT}#{uid}",))
    whole = TenantConfig(tenant_id="whole-chat", service_accounts=("system:serviceaccounts:chat",))
    authenticator = Authenticator(msgspec.structs.replace(known, tenants=(chat, whole)))

    def of(bound: object) -> CIMultiDictProxy[str]:
        return headers(bearer=token(**{"kubernetes.io": bound}))

    assert authenticator.authenticate(of({"serviceaccount": {"uid": uid}})) == "chat"
    for bound in ({"serviceaccount": {"uid": again}}, {"serviceaccount": None}, {}, None, "x"):
        assert refused(authenticator, of(bound)).code == "unknown_tenant", bound
    assert authenticator.authenticate(headers(bearer=token(sub=f"{SUBJECT}#{uid}"))) == "whole-chat", "a name like any"


def test_header_counts_only_with_the_gateways_key(authenticator: Authenticator) -> None:
    claim = ("X-Team", "batch")
    assert authenticator.authenticate(headers(claim)) == DEFAULT_TENANT_ID
    assert authenticator.authenticate(headers(claim, bearer=KEY)) == "chat"
    assert authenticator.authenticate(headers(claim, bearer=GATEWAY_KEY)) == "batch"


def test_gateway_without_or_with_an_unknown_value(authenticator: Authenticator) -> None:
    strict = Authenticator(config(reject=True))
    for fields in (headers(bearer=GATEWAY_KEY), headers(("x-team", "nobody"), bearer=GATEWAY_KEY)):
        assert authenticator.authenticate(fields) == DEFAULT_TENANT_ID
        refusal = refused(strict, fields)
        assert (refusal.status, refusal.code) == (403, "unknown_tenant")


def test_two_tenant_headers_are_refused(authenticator: Authenticator) -> None:
    fields = headers(("x-team", "batch"), ("x-team", "chat"), bearer=GATEWAY_KEY)
    assert refused(authenticator, fields).status == 400
    twice = headers(("Authorization", f"Bearer {KEY}"), ("Authorization", f"Bearer {OTHER_KEY}"))
    assert refused(authenticator, twice).status == 400


def test_first_header_that_is_there_names_the_tenant() -> None:
    known = config()
    gateway = msgspec.structs.replace(known.gateway, tenant_headers=("x-new-name", "x-team"))
    authenticator = Authenticator(msgspec.structs.replace(known, gateway=gateway))
    new, old = ("X-New-Name", "batch"), ("x-team", "batch")
    assert authenticator.authenticate(headers(old, bearer=GATEWAY_KEY)) == "batch"
    assert authenticator.authenticate(headers(new, bearer=GATEWAY_KEY)) == "batch"
    assert authenticator.authenticate(headers(("x-new-name", ""), old, bearer=GATEWAY_KEY)) == "batch"
    assert authenticator.authenticate(headers(("x-new-name", "nobody"), old, bearer=GATEWAY_KEY)) == DEFAULT_TENANT_ID
    assert authenticator.authenticate(headers(new, old)) == DEFAULT_TENANT_ID, "from nobody but the gateway"
    assert refused(authenticator, headers(new, new, bearer=GATEWAY_KEY)).status == 400


def test_shared_key() -> None:
    authenticator = Authenticator(SchedulerConfig(), anonymous=False, shared_keys=["secret"])
    assert authenticator.authenticate(headers(bearer="secret")) == DEFAULT_TENANT_ID
    assert refused(authenticator, headers(bearer="other")).status == 401
    assert refused(authenticator, headers()).status == 401


def test_without_any_credential_configured_one_is_not_looked_at() -> None:
    assert Authenticator(SchedulerConfig()).authenticate(headers(bearer="EMPTY")) == DEFAULT_TENANT_ID
    assert refused(Authenticator(SchedulerConfig(), anonymous=False), headers(bearer="EMPTY")).status == 401


def test_service_account(authenticator: Authenticator) -> None:
    assert authenticator.authenticate(headers(bearer=token())) == "chat"


def test_service_account_of_nobody(authenticator: Authenticator) -> None:
    stranger = headers(bearer=token(sub="system:serviceaccount:chat:other"))
    assert authenticator.authenticate(stranger) == DEFAULT_TENANT_ID
    assert refused(Authenticator(config(reject=True)), stranger).code == "unknown_tenant"


@pytest.mark.parametrize(
    "changed",
    [
        {"key": STRANGERS_KEY},
        {"iss": "https://other.example"},
        {"aud": ["other"]},
        {"aud": None},
        {"exp": None},
        {"sub": None},
        {"kid": "two"},
        {"kid": None},
        {"key": b"0" * 32, "algorithm": "HS256"},
        {"key": None, "algorithm": "none"},
    ],
    ids=" ".join,
)
def test_forged_tokens(authenticator: Authenticator, changed: dict[str, Any]) -> None:
    """Issued in the test, not when tests are collected: a token too old is refused whatever else is wrong with it."""
    assert_invalid(authenticator, token(**changed))


def test_tokens_out_of_their_time(authenticator: Authenticator) -> None:
    assert_invalid(authenticator, token(exp=time.time() - 60))
    assert_invalid(authenticator, token(nbf=time.time() + 600))


def test_broken_tokens(authenticator: Authenticator) -> None:
    for bad in (token()[:-4] + "AAAA", "a.b.c", ".."):
        assert_invalid(authenticator, bad)


def test_a_public_key_is_not_an_hmac_secret(authenticator: Authenticator) -> None:
    """The classic confusion: a token signed by HMAC with the public key's text, which everybody knows."""
    pem = SIGNING_KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    for secret in (pem, json.dumps(public_jwk(SIGNING_KEY)).encode()):
        claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": SUBJECT, "exp": time.time() + 600}
        parts = [{"alg": "HS256", "typ": "JWT", "kid": "one"}, claims]
        signed = b".".join(base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=") for part in parts)
        signature = base64.urlsafe_b64encode(hmac.digest(secret, signed, "sha256")).rstrip(b"=")
        assert refused(authenticator, headers(bearer=(signed + b"." + signature).decode())).status == 401


def test_key_with_another_algorithm_than_it_says() -> None:
    curve_key = ec.generate_private_key(ec.SECP256R1())
    authenticator = Authenticator(config())
    assert refused(authenticator, headers(bearer=token(curve_key, algorithm="ES256"))).status == 401


def test_unusable_key_set_admits_nobody() -> None:
    authenticator = Authenticator(config(jwk={"kty": "unheard-of", "kid": "one"}))
    assert refused(authenticator, headers(bearer=token())).status == 401
    assert authenticator.authenticate(headers(bearer=KEY)) == "chat"
