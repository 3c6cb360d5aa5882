"""ServerSettings: settings of the HTTP process, read once at start and frozen."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evenhand_engine.frontend.push_receiver import PushSettings


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """What the HTTP process is started with.

    Attributes:
        host: address of the public port; None: all.
        port: public port; 0: any free one.
        api_server_count: processes that serve the public port; 1: the one that is started.
        admin_host: address of the admin port, which tenants must not reach.
        admin_port: admin port; 0: any free one.
        served_model_names: names under which clients may ask for the model; the first is the one that answers carry.
        policies: directory of TenantPolicy files, watched; None: everybody is the default tenant.
        push: how an operator pushes the config instead; never together with `policies`.
        allow_unconfigured: with `push`, serve also before a config was ever loaded or pushed.
        anonymous: serve requests without credential as the default tenant.
        api_key: a key that admits to the default tenant; requests without credential are then refused.
        ssl_certfile: PEM certificate chain of the public port; None: plain HTTP.
        ssl_keyfile: its private key; None: it is in the certificate file.
        max_request_bytes: largest body.
        max_tenant_body_bytes: most bytes that the bodies of one tenant's requests in flight take together.
        drain_timeout: seconds that running requests get to finish after SIGTERM.
        drain_notice: seconds for which the admin port's /drained waits for a drain to begin.
        write_timeout: seconds that a client may take to read what is buffered for it before its connection is ended.
        queue_heartbeat: seconds of waiting after which a stream begins with comments, and between two of them; None:
            nothing is sent before the request runs, so that a refusal in the queue is an HTTP status.
        tool_call_parser: how the model writes tool calls; "auto": as its chat template says, "none": it does not.
        reasoning_parser: how its reasoning is told from its answers; None: it is not.
        allowed_origins: of pages that may read answers (CORS); "*": all.
        stall_timeout: seconds without progress, with work to do, after which the engine counts as unhealthy.
    """

    host: str = "0.0.0.0"
    port: int = 8000
    api_server_count: int = 1
    admin_host: str = "127.0.0.1"
    admin_port: int = 9000
    served_model_names: tuple[str, ...] = ()
    policies: Path | None = None
    push: "PushSettings | None" = None
    allow_unconfigured: bool = False
    anonymous: bool = True
    api_key: str | None = None
    ssl_certfile: Path | None = None
    ssl_keyfile: Path | None = None
    max_request_bytes: int = 4 * 2**20
    max_tenant_body_bytes: int = 64 * 2**20
    drain_timeout: float = 30.0
    drain_notice: float = 20.0
    write_timeout: float = 60.0
    queue_heartbeat: float | None = None
    tool_call_parser: str = "auto"
    reasoning_parser: str | None = None
    allowed_origins: tuple[str, ...] = ()
    stall_timeout: float = 60.0

    def names_of(self, model_name: str) -> tuple[str, ...]:
        """Under which clients may ask for the model of this name; the first is the one that answers carry."""
        return self.served_model_names or (model_name,)
