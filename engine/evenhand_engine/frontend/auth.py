"""Authenticator: from a request's headers to its tenant. A tenant is proved, never claimed.

Built anew from each SchedulerConfig and immutable. Pure but for the time at which ServiceAccount tokens are checked.
It never keeps, logs or returns a credential.
"""

import re
import time
from collections.abc import Iterable
from typing import Any, Self

import jwt
from multidict import CIMultiDictProxy

from evenhand_engine.errors import Refusal
from evenhand_engine.frontend.settings import ServerSettings
from evenhand_policy.config import (
    DEFAULT_TENANT_ID,
    SchedulerConfig,
    ServiceAccountIssuer,
    UnknownTenantAction,
)
from evenhand_policy.credentials import key_hash, read_account
from evenhand_policy.identities import service_account_group

_ALGORITHMS = ["RS256", "RS384", "RS512", "PS256", "ES256", "ES384", "EdDSA"]  # asymmetric only: no key confusion
_CLOCK_SKEW_SECONDS = 30
_SERVICE_ACCOUNT = re.compile(r"system:serviceaccount:([^:]+):[^:]+")


class Authenticator:
    """Who may use the engine, as one config says.

    A credential is an API key or a Kubernetes ServiceAccount token, in `Authorization: Bearer`, or where that is missing in
    `x-api-key`, where Anthropic's clients put it. On a request with a gateway's key the config's tenant headers name the tenant; on any other request they mean nothing. Where
    neither config nor command line knows any credential, and requests without one are served, one is not looked at:
    OpenAI's clients cannot leave it out.

    Args:
        config: the config to enforce.
        anonymous: whether a request without credential is served as the default tenant.
        shared_keys: API keys that admit to the default tenant, whatever the config says.
    """

    def __init__(self, config: SchedulerConfig, *, anonymous: bool = True, shared_keys: Iterable[str] = ()) -> None:
        self._anonymous = anonymous
        self._shares_with_unknown = config.unknown_tenants.action is UnknownTenantAction.SHARE
        # Looked up by SHA-256, so how long a look-up takes says nothing about the key.
        self._tenants_by_key = {key_hash(key): DEFAULT_TENANT_ID for key in shared_keys}
        self._tenants_by_key |= {key: tenant.tenant_id for tenant in config.tenants for key in tenant.key_hashes}
        self._accounts = {
            subject: (tenant.tenant_id, uid)
            for tenant in config.tenants
            for subject, uid in map(read_account, tenant.service_accounts)
        }
        self._tenants_by_header = {v: tenant.tenant_id for tenant in config.tenants for v in tenant.header_values}
        self._gateway_keys = frozenset(config.gateway.key_hashes)
        self._tenant_headers = config.gateway.headers
        self._is_open = anonymous and not (self._tenants_by_key or self._gateway_keys or config.service_accounts)
        self._tokens = None if config.service_accounts is None else _TokenVerifier(config.service_accounts)

    @classmethod
    def of(cls, settings: ServerSettings, config: SchedulerConfig) -> Self:
        """By the config and by the command line."""
        key = settings.api_key
        return cls(config, anonymous=settings.anonymous and key is None, shared_keys=[] if key is None else [key])

    def authenticate(self, headers: CIMultiDictProxy[str]) -> str:
        """The tenant's id; raises Refusal 401 without a valid credential, 403 if a valid one has no tenant."""
        scheme, _, credential = _single(headers, "Authorization").strip().partition(" ")
        if not scheme and (api_key := _single(headers, "x-api-key")):
            scheme, credential = "bearer", api_key
        credential = credential.strip()
        if not scheme or self._is_open:
            return self._anonymous_tenant()
        if scheme.lower() != "bearer" or not credential:
            raise _unauthorized("The Authorization header must be `Bearer` and an API key.")
        hashed = key_hash(credential)
        if hashed in self._gateway_keys:
            return self._known_or_shared(self._tenants_by_header.get(self._named(headers)))
        if (tenant_id := self._tenants_by_key.get(hashed)) is not None:
            return tenant_id
        if self._tokens is not None and credential.count(".") == 2:
            return self._known_or_shared(self._tenant_of_account(*self._tokens.account(credential)))
        raise _unauthorized("The API key is not valid here.")

    def _named(self, headers: CIMultiDictProxy[str]) -> str:
        """What the gateway says, in the first of its headers that is there; empty where it says nothing."""
        return next(filter(None, (_single(headers, name) for name in self._tenant_headers)), "")

    def _tenant_of_account(self, subject: str, uid: str) -> str | None:
        """Whoever claims the ServiceAccount, else whoever claims every one of its namespace. Where one uid is claimed, an
        account of that name with another is nobody's."""
        if subject not in self._accounts:
            account = _SERVICE_ACCOUNT.fullmatch(subject)
            subject = service_account_group(account[1]) if account else ""
        tenant_id, claimed_uid = self._accounts.get(subject, (None, ""))
        return tenant_id if claimed_uid in ("", uid) else None

    def _anonymous_tenant(self) -> str:
        if self._anonymous and self._shares_with_unknown:
            return DEFAULT_TENANT_ID
        raise _unauthorized("An API key is needed: send `Authorization: Bearer` and the key.")

    def _known_or_shared(self, tenant_id: str | None) -> str:
        if tenant_id is not None:
            return tenant_id
        if self._shares_with_unknown:
            return DEFAULT_TENANT_ID
        raise Refusal(403, "unknown_tenant", "The credential is valid, but no TenantPolicy claims it.")


class _TokenVerifier:
    """Verifies ServiceAccount tokens offline against the cluster's published keys."""

    def __init__(self, issuer: ServiceAccountIssuer) -> None:
        self._issuer = issuer
        try:
            keys = jwt.PyJWKSet.from_dict({"keys": issuer.jwks.get("keys", [])}).keys
        except jwt.PyJWTError:
            keys = []  # no key that we can use: no token is valid
        self._keys = {key.key_id: key for key in keys}

    def account(self, token: str) -> tuple[str, str]:
        """The token's `sub`, as system:serviceaccount:NAMESPACE:NAME, and the account's uid, empty where the token does not
        tell it; raises Refusal 401 if it is not valid."""
        try:
            key = self._keys.get(jwt.get_unverified_header(token).get("kid"))
            if key is None:
                raise _unauthorized("The token is signed with a key that is not known here.")
            claims = jwt.decode(
                token,
                key,
                algorithms=_ALGORITHMS,
                issuer=self._issuer.issuer,
                audience=self._issuer.audience,
                leeway=_CLOCK_SKEW_SECONDS,
                options={"require": ["exp", "iss", "aud", "sub", *(["iat"] if self._issuer.max_age_seconds else [])]},
            )
        except jwt.ExpiredSignatureError as error:
            raise _unauthorized("The token has expired.") from error
        except jwt.PyJWTError as error:
            raise _unauthorized("The token is not valid here.") from error
        oldest = self._issuer.max_age_seconds
        if oldest is not None and time.time() - claims["iat"] > oldest + _CLOCK_SKEW_SECONDS:
            raise _unauthorized("The token was issued too long ago; use one that is renewed, such as a projected one.")
        return str(claims["sub"]), _uid(claims)


def _uid(claims: dict[str, Any]) -> str:
    bound = claims.get("kubernetes.io")
    account = bound.get("serviceaccount") if isinstance(bound, dict) else None
    return str(account.get("uid", "")) if isinstance(account, dict) else ""


def _single(headers: CIMultiDictProxy[str], name: str) -> str:
    """The header's value; a second one, perhaps set by the client before a gateway added its own, is refused."""
    values = headers.getall(name, [""])
    if len(values) > 1:
        raise Refusal(400, "invalid_value", f"The request has more than one {name} header.", param=name)
    return values[0]


def _unauthorized(message: str) -> Refusal:
    return Refusal(401, "invalid_api_key", message)
