"""Which requests come from this machine itself: they are shown what tenants must not see."""

import ipaddress

from aiohttp import web

_OWN_ADDRESSES = frozenset({"127.0.0.1", "::1", "::ffff:127.0.0.1"})
_FORWARDED = frozenset({"forwarded", "via", "x-forwarded-for", "x-forwarded-client-cert", "x-envoy-external-address"})


def is_local(request: web.Request) -> bool:
    """From this machine, not through a proxy, and by an address: a name may be a web page's, which rebinds it to reach
    this port. A sidecar's 127.0.0.6 is not this machine but everybody whom the sidecar lets in."""
    host = request.url.host or ""
    if _FORWARDED & {name.lower() for name in request.headers}:
        return False
    return request.remote in _OWN_ADDRESSES and (host == "localhost" or _is_loopback(host))


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
