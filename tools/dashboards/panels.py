"""What the dashboards show: a list of panels, each with the PromQL that it asks.

`SELECTOR` in it stands for the namespace and pool that are chosen at the top of the page.
"""

from typing import NamedTuple

SELECTOR = 'namespace="$namespace",evenhand_dev_pool="$pool"'


class Panel(NamedTuple):
    """One graph: `queries` are PromQL and the legend of each; `unit` is Grafana's name of it."""

    title: str
    unit: str
    description: str
    queries: tuple[tuple[str, str], ...]


class Dashboard(NamedTuple):
    """A page of graphs. `variables` are chosen at its top, in this order, each by the labels of a metric."""

    uid: str
    title: str
    variables: tuple[tuple[str, str], ...]
    panels: tuple[Panel, ...]


NAMESPACE = ("namespace", "label_values(evenhand_config_current, namespace)")
POOL = ("pool", 'label_values(evenhand_config_current{namespace="$namespace"}, evenhand_dev_pool)')
TENANT = ("tenant", "label_values(evenhand_service_total{SELECTOR}, tenant)")
OF_TENANT = 'SELECTOR,tenant=~"$tenant"'


def quantile(part: str, metric: str, by: str = "tenant", selector: str = OF_TENANT) -> str:
    """A quantile over all engines of the pool."""
    inner = f"sum by ({by}, le) (rate({metric}_bucket{{{selector}}}[$__rate_interval]))"
    return f"histogram_quantile({part}, {inner})"


def summed(metric: str, by: str = "tenant", selector: str = OF_TENANT) -> str:
    """A gauge, added up over the engines."""
    return f"sum by ({by}) ({metric}{{{selector}}})"


def rate(metric: str, by: str = "tenant", selector: str = OF_TENANT) -> str:
    """A counter's rate, added up over the engines."""
    return f"sum by ({by}) (rate({metric}{{{selector}}}[$__rate_interval]))"


TENANTS = Dashboard(
    "evenhand-tenants",
    "Evenhand: tenants",
    (NAMESPACE, POOL, TENANT),
    (
        Panel(
            "Share attained",
            "percentunit",
            "Part of recent service that each tenant got, on the average of the engines.",
            ((f"avg by (tenant) (evenhand_attained_share{{{OF_TENANT}}})", "{{tenant}}"),),
        ),
        Panel(
            "Attained beside entitled",
            "percentunit",
            "Below 0 a tenant got less than its weight gives it while it had work.",
            (
                (
                    f"avg by (tenant) (evenhand_attained_share{{{OF_TENANT}}} - evenhand_entitled_share{{{OF_TENANT}}})",
                    "{{tenant}}",
                ),
            ),
        ),
        Panel(
            "Lag as part of its bound",
            "percentunit",
            "Above 1 the bound of fairness does not hold, and EvenhandLagOverBound fires.",
            (
                (
                    f"max by (tenant) (evenhand_service_lag{{{OF_TENANT}}} / (evenhand_service_lag_bound{{{OF_TENANT}}} > 0))",
                    "{{tenant}}",
                ),
            ),
        ),
        Panel(
            "Requests that wait",
            "short",
            "By tenant, in all engines.",
            ((summed("evenhand_waiting_requests"), "{{tenant}}"),),
        ),
        Panel(
            "Requests that run",
            "short",
            "By tenant, in all engines.",
            ((summed("evenhand_running_requests"), "{{tenant}}"),),
        ),
        Panel(
            "Time to first token",
            "s",
            "Median and 99th percentile.",
            tuple(
                (quantile(part, "evenhand_time_to_first_token_seconds"), f"{{{{tenant}}}} {name}")
                for part, name in (("0.5", "p50"), ("0.99", "p99"))
            ),
        ),
        Panel(
            "Time between tokens",
            "s",
            "99th percentile.",
            ((quantile("0.99", "evenhand_inter_token_latency_seconds"), "{{tenant}}"),),
        ),
        Panel(
            "Time in the queue",
            "s",
            "Arrival to first step, 99th percentile.",
            ((quantile("0.99", "evenhand_queue_time_seconds"), "{{tenant}}"),),
        ),
        Panel(
            "Tokens",
            "short",
            "A second; cached ones are part of the prompts.",
            ((rate("evenhand_tokens_total", "tenant, kind"), "{{tenant}} {{kind}}"),),
        ),
        Panel(
            "Service",
            "short",
            "A second, in units of price: what shares are shares of.",
            ((rate("evenhand_service_total"), "{{tenant}}"),),
        ),
        Panel("KV blocks held", "short", "In all engines.", ((summed("evenhand_kv_blocks"), "{{tenant}}"),)),
        Panel(
            "Refused, and what audited limits would refuse",
            "short",
            "A second, by reason.",
            (
                (rate("evenhand_refusals_total", "tenant, reason"), "{{tenant}} {{reason}}"),
                (rate("evenhand_audited_total", "tenant, reason"), "{{tenant}} {{reason}} (audit)"),
            ),
        ),
        Panel(
            "Preempted",
            "short",
            "Requests a second that gave their memory to others.",
            ((rate("evenhand_preemptions_total"), "{{tenant}}"),),
        ),
        Panel(
            "Ended by outcome",
            "short",
            "Prompts a second.",
            ((rate("evenhand_requests_total", "tenant, outcome"), "{{tenant}} {{outcome}}"),),
        ),
    ),
)

ENGINES = Dashboard(
    "evenhand-engines",
    "Evenhand: engines and operator",
    (NAMESPACE, POOL),
    (
        Panel(
            "KV cache in use",
            "percentunit",
            "By engine.",
            (("vllm:kv_cache_usage_perc{SELECTOR}", "{{pod}}"),),
        ),
        Panel(
            "Requests that wait",
            "short",
            "For capacity, or deferred although there is room.",
            ((summed("vllm:num_requests_waiting_by_reason", "pod, reason", "SELECTOR"), "{{pod}} {{reason}}"),),
        ),
        Panel("Requests that run", "short", "By engine.", (("vllm:num_requests_running{SELECTOR}", "{{pod}}"),)),
        Panel(
            "Time of a step",
            "s",
            "99th percentile.",
            ((quantile("0.99", "evenhand_step_seconds", "pod", "SELECTOR"), "{{pod}}"),),
        ),
        Panel(
            "Prompts found in the cache",
            "percentunit",
            "Tokens found, of those looked up.",
            (
                (
                    f"{rate('vllm:prefix_cache_hits_total', 'pod', 'SELECTOR')} / "
                    f"{rate('vllm:prefix_cache_queries_total', 'pod', 'SELECTOR')}",
                    "{{pod}}",
                ),
            ),
        ),
        Panel(
            "Preempted",
            "short",
            "Requests a second.",
            ((rate("vllm:num_preemptions_total", "pod", "SELECTOR"), "{{pod}}"),),
        ),
        Panel(
            "Config",
            "short",
            "1 while the engine enforces the newest config that it was sent; its source tells whether it was ever sent one.",
            (
                ("evenhand_config_current{SELECTOR}", "{{pod}} current"),
                ('evenhand_config_info{SELECTOR,source!="Push"}', "{{pod}} {{source}}"),
            ),
        ),
        Panel(
            "Pods by state",
            "short",
            "As the statuses of all pools say.",
            (("sum by (state) (evenhand_operator_pods)", "{{state}}"),),
        ),
        Panel(
            "Push to one pod",
            "s",
            "From a new document until a pod enforces it.",
            tuple(
                (quantile(part, "evenhand_operator_push_seconds", "job", ""), name)
                for part, name in (("0.5", "p50"), ("0.99", "p99"))
            ),
        ),
        Panel(
            "Pushes that fail",
            "short",
            "A second, by reason.",
            (("sum by (reason) (rate(evenhand_operator_push_errors_total[$__rate_interval]))", "{{reason}}"),),
        ),
        Panel(
            "Policies",
            "short",
            "By condition.",
            (("sum by (condition, status) (evenhand_operator_policies)", "{{condition}}={{status}}"),),
        ),
        Panel(
            "Work that waits",
            "short",
            "Changes to compile, statuses to write, pods to push to.",
            (("sum by (queue) (evenhand_operator_queue_depth)", "{{queue}}"),),
        ),
        Panel(
            "Reconcile",
            "s",
            "From the first unseen change to the documents that hold it, 99th percentile.",
            ((quantile("0.99", "evenhand_operator_reconcile_seconds", "job", ""), "p99"),),
        ),
        Panel(
            "Leader",
            "short",
            "One replica acts; since when everything was last listed.",
            (
                ("evenhand_operator_is_leader", "{{pod}}"),
                ("time() - max(evenhand_operator_last_list_timestamp_seconds)", "seconds since the last list"),
            ),
        ),
    ),
)

DASHBOARDS = (TENANTS, ENGINES)


def queries(dashboard: Dashboard) -> list[str]:
    """Everything that it asks, with Grafana's variables in it."""
    return [expression.replace("SELECTOR", SELECTOR) for panel in dashboard.panels for expression, _ in panel.queries]
