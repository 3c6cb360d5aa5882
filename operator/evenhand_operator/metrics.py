"""The operator's own metrics, in a registry of their own."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

REGISTRY = CollectorRegistry()

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)

PUSH_SECONDS = Histogram(
    "evenhand_operator_push_seconds",
    "Time from a new document to one pod that enforces it",
    buckets=_SECONDS,
    registry=REGISTRY,
)
PUSH_ERRORS = Counter(
    "evenhand_operator_push_errors",
    "Pushes after which the pod did not enforce the document",
    ["reason"],
    registry=REGISTRY,
)
DOCUMENTS_SENT = Counter("evenhand_operator_documents_sent", "Documents sent to pods", registry=REGISTRY)
PUSHED_BYTES = Counter("evenhand_operator_pushed_bytes", "Bytes of documents sent to pods", registry=REGISTRY)
RECONCILE_SECONDS = Histogram(
    "evenhand_operator_reconcile_seconds",
    "Time from the first unseen change to the documents that hold it",
    buckets=_SECONDS,
    registry=REGISTRY,
)
BUILDS = Counter("evenhand_operator_builds", "Times that all policies were compiled", registry=REGISTRY)
QUEUE_DEPTH = Gauge(
    "evenhand_operator_queue_depth",
    "Work that waits: changes to compile, statuses to write, pods to push to",
    ["queue"],
    registry=REGISTRY,
)


def show_queues(changes: Callable[[], float], statuses: Callable[[], float], pods: Callable[[], float]) -> None:
    """From now on `queue_depth` is what these say when somebody asks."""
    for queue, depth in (("changes", changes), ("statuses", statuses), ("pods", pods)):
        QUEUE_DEPTH.labels(queue).set_function(depth)


API_WRITES = Counter(
    "evenhand_operator_api_writes",
    "Requests that write to the API server",
    ["resource"],
    registry=REGISTRY,
)
POLICIES = Gauge(
    "evenhand_operator_policies", "TenantPolicies by condition", ["condition", "status"], registry=REGISTRY
)
PODS = Gauge("evenhand_operator_pods", "Engine pods by state", ["state"], registry=REGISTRY)
IS_LEADER = Gauge("evenhand_operator_is_leader", "1 while this replica pushes and writes", registry=REGISTRY)
EPOCH = Gauge("evenhand_operator_epoch", "Term of this replica as leader; 0 before the first", registry=REGISTRY)
LAST_LIST = Gauge(
    "evenhand_operator_last_list_timestamp_seconds",
    "Unix time at which everything was last listed",
    registry=REGISTRY,
)
FOREIGN_POOLS = Gauge(
    "evenhand_operator_foreign_pools",
    "Pools that another installation of the operator serves, and this one leaves alone",
    registry=REGISTRY,
)
UNREADABLE_NAMESPACES = Gauge(
    "evenhand_operator_unreadable_namespaces",
    "Served namespaces that the API server refuses to tell of; their policies and pools are left out",
    registry=REGISTRY,
)
