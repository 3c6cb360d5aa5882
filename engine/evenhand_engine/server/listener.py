"""Listening sockets, bound before anything is loaded so that a port in use is found at once, and their TLS."""

import contextlib
import errno
import logging
import resource
import socket
import ssl

from evenhand_engine.errors import StartupError
from evenhand_engine.frontend.settings import ServerSettings

log = logging.getLogger(__name__)

BACKLOG = 1024

_NO_ADDRESS = {errno.EADDRNOTAVAIL, socket.EAI_NONAME, socket.EAI_AGAIN}
_OPEN_MAX = 10_240  # what macOS takes, whose hard limit is infinite: man 2 setrlimit


class Ports:
    """Where a server listens.

    Attributes:
        publics: sockets of the public port, one for each process that serves it.
        admin: socket of the admin port.
        tls: what the public port speaks; None: plain HTTP.
    """

    def __init__(self, stack: contextlib.AsyncExitStack, settings: ServerSettings) -> None:
        """Until the stack is left. Raises StartupError."""
        allow_many_connections()
        self.tls = tls_context(settings)
        publics = listen_together(settings.host, settings.port, "--port", settings.api_server_count)
        self.publics = [stack.enter_context(public) for public in publics]
        self.admin = stack.enter_context(listen(settings.admin_host, settings.admin_port, "--admin-port"))

    @property
    def url(self) -> str:
        """Where a client on this machine reaches the public port."""
        return _url_of("http" if self.tls is None else "https", self.publics[0])

    @property
    def admin_url(self) -> str:
        return _url_of("http", self.admin)


def listen(host: str, port: int, flag: str, *, shared: bool = False) -> socket.socket:
    """A listening socket; raises StartupError that names `flag`, which chose the port, or its address.

    `shared`: others of this user may listen on the port as well. `::` is every address of both families, or of IPv4 where the machine has no IPv6: what a Pod has is its cluster's choice.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server(
            (host, port), family=family, backlog=BACKLOG, reuse_port=shared, dualstack_ipv6=host == "::"
        )
    except OSError as error:
        if host == "::" and error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
            return listen("0.0.0.0", port, flag, shared=shared)
        if error.errno in _NO_ADDRESS:
            flag = flag.replace("port", "host")
        raise StartupError(f"cannot listen on {host}, port {port}: {error.strerror}. Choose another {flag}") from error


def listen_together(host: str, port: int, flag: str, count: int) -> list[socket.socket]:
    """As many sockets that listen on one port, between which the kernel divides connections; raises StartupError.

    The first look is at a socket of its own, since the port of another server that shares it would seem to be free.
    """
    if count == 1:
        return [listen(host, port, flag)]
    with listen(host, port, flag) as found:
        host, port = found.getsockname()[:2]
    sockets: list[socket.socket] = []
    try:
        for _ in range(count):
            sockets.append(listen(host, port, flag, shared=True))
    except StartupError:
        for opened in sockets:
            opened.close()
        raise
    return sockets


def allow_many_connections() -> None:
    """Each connection is an open file, and the usual soft limit of 1,024 is a default for programs that use select."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max(soft, _OPEN_MAX) if hard == resource.RLIM_INFINITY else hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def tls_context(settings: ServerSettings) -> ssl.SSLContext | None:
    """What the public port speaks TLS with; None for plain HTTP. Raises StartupError if the files are no good."""
    if settings.ssl_certfile is None:
        if settings.ssl_keyfile is not None:
            raise StartupError(f"--ssl-keyfile {settings.ssl_keyfile} needs its certificate: give --ssl-certfile too")
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(settings.ssl_certfile, settings.ssl_keyfile)
    except OSError as error:  # ssl.SSLError is one
        files = " and ".join(str(path) for path in (settings.ssl_certfile, settings.ssl_keyfile) if path)
        raise StartupError(f"cannot use the TLS certificate of {files}: {error}") from error
    return context


async def watch_certificate(settings: ServerSettings, context: ssl.SSLContext) -> None:
    """Until cancelled, let new connections use the certificate as it is renewed; one that is no good is not used."""
    from evenhand_engine.frontend.directory_watch import watch_directory

    assert settings.ssl_certfile is not None

    async def reload() -> None:
        try:
            tls_context(settings)  # first by itself: a failure half-way would leave certificate and key unmatched
        except StartupError as error:
            log.error("the renewed certificate is not used", extra={"fields": {"error": error}})
        else:
            context.load_cert_chain(settings.ssl_certfile or "", settings.ssl_keyfile)

    await watch_directory(settings.ssl_certfile.parent, reload)


def _url_of(scheme: str, listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
