"""`evenhand-operator`: options, logging, exit code."""

import asyncio
import contextlib
import gc
import logging
import os
import secrets
import signal
import socket
import sys

import click

from evenhand_operator.settings import Settings

EXIT_FAILURE = 1


@click.command(context_settings={"auto_envvar_prefix": "EVENHAND", "show_default": True})
@click.option(
    "-n", "--namespace", "namespaces", multiple=True, help="Namespace to look at; may be repeated. All, if not given."
)
@click.option("--pod-selector", default="", help="Label selector of the pods to watch; pools select among these.")
@click.option("--host", default="::", help="Address of the metrics port; ::, which is all, has both families.")
@click.option(
    "--metrics-port", type=click.IntRange(0, 65535), default=8080, help="For /metrics, /healthz and /readyz; 0: any."
)
@click.option("--lease-name", default="evenhand-operator", help="Lease by which replicas agree on a leader.")
@click.option("--lease-namespace", help="Namespace of the Lease; the operator's own, if not given.")
@click.option(
    "--relist-seconds",
    type=click.IntRange(10, 3600),
    default=300,
    help="How often everything is read again, so that what somebody deleted comes back.",
)
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info")
@click.version_option(package_name="evenhand")
def main(
    namespaces: tuple[str, ...],
    pod_selector: str,
    host: str,
    metrics_port: int,
    lease_name: str,
    lease_namespace: str | None,
    relist_seconds: int,
    log_level: str,
) -> None:
    """Compile TenantPolicies and push them to the engines of their pools.

    In a cluster it uses its ServiceAccount, outside the current context of KUBECONFIG.
    """
    _set_up_logging(log_level)
    gc.set_threshold(50_000, 20, 50)  # thousands of objects live long: looking at them again and again is slow
    sys.setswitchinterval(0.001)  # who pushes waits for little each time, and shall not wait for who compiles or lists
    settings = Settings(
        namespaces=namespaces,
        pod_selector=pod_selector,
        host=host,
        metrics_port=metrics_port,
        lease_name=lease_name,
        lease_namespace=lease_namespace,
        relist_seconds=relist_seconds,
        identity=f"{os.environ.get('POD_NAME') or socket.gethostname()}-{secrets.token_hex(4)}",
    )
    from evenhand_operator.login import LoginError  # here, so that --help is quick

    try:
        with contextlib.suppress(asyncio.CancelledError):
            asyncio.run(_run(settings))
    except (LoginError, OSError) as error:
        click.echo(f"evenhand-operator: {error}", err=True)
        sys.exit(EXIT_FAILURE)


async def _run(settings: Settings) -> None:
    from evenhand_operator.replica import Replica

    def announce(port: int) -> None:
        logging.getLogger(__name__).info("metrics at http://%s:%d/metrics", settings.host, port)

    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    await Replica(settings).run(announce)


def _set_up_logging(level: str) -> None:
    logging.basicConfig(
        stream=sys.stderr, level=level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    for chatty in ("kopf.objects", "kopf.activities", "kopf._core.engines.activities"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    logging.getLogger("kopf._core.reactor.running").setLevel(logging.ERROR)  # that it does not get signals is intended
