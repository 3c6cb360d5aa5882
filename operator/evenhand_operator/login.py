"""How the operator proves itself to the API server: by its ServiceAccount in the cluster, by KUBECONFIG outside."""

import os
from pathlib import Path

import kopf
import yaml

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


class LoginError(Exception):
    """There are no usable credentials; the message says what to do."""


def log_in() -> kopf.ConnectionInfo:
    """Credentials as they are now; called again when the API server no longer accepts them, since tokens are renewed.

    Raises:
        LoginError: there are none, or of a kind that is not supported.
    """
    settings = kopf.OperatorSettings()
    has_kubeconfig = bool(os.environ.get("KUBECONFIG"))
    if not has_kubeconfig and (info := kopf.login_with_service_account(settings=settings)):
        return info
    try:
        info = kopf.login_with_kubeconfig(settings=settings)
    except (OSError, yaml.YAMLError, KeyError, kopf.LoginError) as error:
        raise LoginError(f"the kubeconfig cannot be used: {error}") from None
    if info is None:
        raise LoginError("neither a ServiceAccount nor a kubeconfig: set KUBECONFIG, or run in a cluster")
    if not (info.token or info.username or info.certificate_data or info.certificate_path):
        advice = "use a token, a client certificate or `kubectl create token`"
        raise LoginError(f"the kubeconfig's user has no credentials that need no other program; {advice}")
    return info


def own_namespace(info: kopf.ConnectionInfo) -> str:
    """Namespace of the operator itself."""
    return info.default_namespace or "default"
