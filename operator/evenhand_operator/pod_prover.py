"""PodProver: whether a token is that of a certain pod, verified offline by the cluster's published keys."""

from collections.abc import Callable

import jwt

from evenhand_operator.objects import EnginePod
from evenhand_policy.config import ServiceAccountIssuer
from evenhand_policy.push_protocol import POD_TOKEN_AUDIENCE

_ALGORITHMS = ["RS256", "RS384", "RS512", "PS256", "ES256", "ES384", "EdDSA"]  # asymmetric only: no key confusion
_CLOCK_SKEW_SECONDS = 60


class PodProver:
    """Keeps the issuer's keys as they were last parsed."""

    def __init__(self, issuer: Callable[[], ServiceAccountIssuer | None]) -> None:
        self._issuer = issuer
        self._parsed: tuple[ServiceAccountIssuer | None, dict[str | None, jwt.PyJWK]] = (None, {})

    def problem(self, token: str, pod: EnginePod) -> str | None:
        """Why the token does not prove that its holder runs in the pod; None: it does."""
        issuer = self._issuer()
        if issuer is None:
            return "the cluster's token issuer is not known, so no pod can be told from another"
        if not token:
            return f"it has no token: mount a projected one for the audience {POD_TOKEN_AUDIENCE}, for --pod-token"
        try:
            key = self._keys(issuer).get(jwt.get_unverified_header(token).get("kid"))
            if key is None:
                return "its token is signed with a key that the cluster does not publish"
            claims = jwt.decode(
                token,
                key,
                algorithms=_ALGORITHMS,
                issuer=issuer.issuer,
                audience=POD_TOKEN_AUDIENCE,
                leeway=_CLOCK_SKEW_SECONDS,
                options={"require": ["exp", "iss", "aud", "sub"]},
            )
        except jwt.PyJWTError as error:
            return f"its token is not valid: {error}"
        bound = claims.get("kubernetes.io")
        of_pod = bound.get("pod") if isinstance(bound, dict) else None
        uid = of_pod.get("uid") if isinstance(of_pod, dict) else None
        return None if uid == pod.uid else "its token is of another pod"

    def _keys(self, issuer: ServiceAccountIssuer) -> dict[str | None, jwt.PyJWK]:
        if self._parsed[0] is not issuer:
            try:
                found = jwt.PyJWKSet.from_dict({"keys": issuer.jwks.get("keys", [])}).keys
            except jwt.PyJWTError:
                found = []  # no key that we can use: no token is valid
            self._parsed = issuer, {key.key_id: key for key in found}
        return self._parsed[1]
