"""Settings of the operator: read once at start and frozen."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Settings:
    """What the operator is started with.

    Attributes:
        namespaces: those whose policies, pools, pods and Secrets it looks at; empty: all.
        pod_selector: label selector of the pods that it watches, such as `app=evenhand-engine`; pools select among
            these. Empty: all pods, which costs memory and traffic in a large cluster.
        host: address of the metrics port; `::`: all, of both families.
        metrics_port: for /metrics, /healthz and /readyz; 0: any free one.
        lease_name: of the Lease by which replicas agree on a leader.
        lease_namespace: where the Lease is; None: the operator's own namespace.
        identity: of this replica, unique among all that ever were.
        quiet_seconds: a change waits for others for so long after the latest one...
        longest_wait_seconds: ... and for so long at most...
        commit_patience: after many changes both are so many times as long, so that a large commit is few builds.
        settle_seconds: statuses wait so long for the answers of pods, so that the usual change is one write.
        new_pod_grace_seconds: a pod that has not answered yet counts as one that does not enforce after so long.
        relist_seconds: everything is listed again this often.
        key_rotation_seconds: the key to sign with is replaced when it is so old.
        lease_seconds: a leader that does not renew the Lease for so long is replaced.
        renew_deadline_seconds: a leader that cannot renew the Lease for so long stops acting as one.
        renew_seconds: a leader renews the Lease this often.
    """

    namespaces: tuple[str, ...] = ()
    pod_selector: str = ""
    host: str = "::"
    metrics_port: int = 8080
    lease_name: str = "evenhand-operator"
    lease_namespace: str | None = None
    identity: str = "evenhand-operator"
    quiet_seconds: float = 0.05
    longest_wait_seconds: float = 0.5
    commit_patience: float = 4.0
    settle_seconds: float = 1.0
    new_pod_grace_seconds: float = 10.0
    relist_seconds: float = 300.0
    key_rotation_seconds: float = 30 * 86400.0
    lease_seconds: int = 10
    renew_deadline_seconds: float = 7.0
    renew_seconds: float = 2.0
