"""RequestVerifier: decides which requests on the admin port are the operator's, to this pod, of now, and the first time."""

from evenhand_policy.push_protocol import MAX_CLOCK_SKEW_SECONDS, Request, UnsignedError, read_request
from evenhand_policy.signatures import PublicKeys

_MAX_REMEMBERED_NONCES = 100_000


class UnverifiedError(Exception):
    """A request is not believed; the message says why. `request` is set where the operator signed it."""

    def __init__(self, message: str, request: Request | None = None) -> None:
        super().__init__(message)
        self.request = request


class RequestVerifier:
    """Remembers the nonces of those that were believed until they expire."""

    def __init__(self) -> None:
        self._expiry_by_nonce: dict[str, float] = {}  # in the order in which they came, so nearly that of expiry

    def verify(self, keys: PublicKeys, method: str, path: str, authorization: str, pod: str, now: float) -> Request:
        """The request in the header, at Unix time `now`; `pod` is this pod's uid, empty where it is not known.

        Raises:
            UnverifiedError: nobody known signed it, it is not what was signed, for another pod, more than
                `MAX_CLOCK_SKEW_SECONDS` away, or was here before.
        """
        try:
            request = read_request(keys, authorization)
        except UnsignedError as error:
            raise UnverifiedError(str(error)) from None
        if (request.method, request.path) != (method, path):
            raise UnverifiedError("another request was signed")
        if pod and request.aud != pod:
            raise UnverifiedError("the request is for another pod")
        if not abs(request.iat - now) <= MAX_CLOCK_SKEW_SECONDS:
            skew = f"its time is more than {MAX_CLOCK_SKEW_SECONDS:.0f} s from this engine's clock"
            raise UnverifiedError(skew, request)
        self._forget_expired(now)
        if request.jti in self._expiry_by_nonce:
            raise UnverifiedError("the request was sent before")
        if len(self._expiry_by_nonce) >= _MAX_REMEMBERED_NONCES:
            raise UnverifiedError("too many requests within a short time", request)
        self._expiry_by_nonce[request.jti] = now + 2 * MAX_CLOCK_SKEW_SECONDS
        return request

    def _forget_expired(self, now: float) -> None:
        while self._expiry_by_nonce:
            nonce = next(iter(self._expiry_by_nonce))
            if self._expiry_by_nonce[nonce] > now:
                return
            del self._expiry_by_nonce[nonce]
