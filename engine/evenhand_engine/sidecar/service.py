"""SidecarService: the front end before an engine that somebody else wrote."""

import hmac
import secrets
from collections.abc import Iterable
from enum import StrEnum

from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from evenhand_engine.backends.upstream import Upstream
from evenhand_engine.frontend.config_in_force import ConfigInForce
from evenhand_engine.frontend.service import Service
from evenhand_engine.frontend.settings import ServerSettings
from evenhand_engine.sidecar.counting import PromptCounter
from evenhand_engine.text.tokenizer import Tokenizer
from evenhand_policy.config import LatencyClass

_CLASSES = tuple(LatencyClass)
_MANAGEMENT = {  # of vLLM, SGLang and llama.cpp: for whoever runs the engine, on its own port
    *("/sleep", "/wake_up", "/collective_rpc", "/reset_prefix_cache", "/reset_mm_cache", "/scale_elastic_ep"),
    *("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/start_profile", "/stop_profile", "/flush_cache"),
    *("/update_weights_from_disk", "/update_weights_from_tensor", "/update_weights_from_distributed"),
    *("/init_weights_update_group", "/release_memory_occupation", "/resume_memory_occupation", "/pause", "/resume"),
    *("/load_lora_adapter", "/unload_lora_adapter", "/set_internal_state", "/abort_request", "/abort_requests"),
    *(
        "/configure_logging",
        "/clear_hicache_storage_backend",
        "/props",
        "/slots",
        "/lora-adapters",
        "/pause_generation",
    ),
    *("/continue_generation", "/models/load", "/models/unload", "/freeze_gc", "/get_server_info", "/server_info"),
    *("/health_generate", "/update_weights_from_ipc", "/update_weight_version", "/get_weights_by_name", "/slow_down"),
    *("/init_weights_send_group_for_remote_instance", "/send_weights_to_remote_instance", "/set_trace_level"),
    *("/load_lora_adapter_from_tensors", "/start_expert_distribution_record", "/stop_expert_distribution_record"),
    *(
        "/dump_expert_distribution_record",
        "/open_session",
        "/close_session",
        "/hicache",
        "/destroy_weights_update_group",
    ),
    *("/reset_encoder_cache", "/update_weights", "/init_weight_transfer_engine", "/is_scaling_elastic_ep", "/scale_up"),
}


class UpstreamPriority(StrEnum):
    """Whose sense of a body's `priority` is used to pass on a tenant's class."""

    OFF = "off"
    VLLM = "vllm"  # the lowest goes first
    SGLANG = "sglang"  # the highest goes first


class SidecarService(Service):
    """The running sidecar.

    Attributes:
        upstream: the engine behind it, and the queue before that.
        prompts: counts prompts before the upstream does.
    """

    def __init__(
        self,
        settings: ServerSettings,
        upstream: Upstream,
        in_force: ConfigInForce,
        *,
        priority: UpstreamPriority = UpstreamPriority.OFF,
        salts_caches: bool = False,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        super().__init__(settings, upstream, in_force)
        self.upstream = upstream
        self.prompts = PromptCounter(upstream, tokenizer)
        self._priority = priority
        self._salt_key = secrets.token_bytes(32) if salts_caches else None
        self._window = CollectorRegistry()
        self._window.register(_WindowCollector(upstream))
        self.metrics.tenant_registry.register(_WindowCollector(upstream))

    @property
    def backend_name(self) -> str:
        return self.upstream.backend

    def health(self, now: float) -> str | None:
        return self.upstream.problem

    def window_metrics(self) -> bytes:
        """The window's state in Prometheus' text format."""
        return generate_latest(self._window)

    def is_management(self, path: str) -> bool:
        """Whether the path changes or reveals the engine for all tenants."""
        parts = [part for part in path.split("/") if part]
        return any("/" + "/".join(parts[:length]) in _MANAGEMENT for length in range(1, len(parts) + 1))

    def upstream_priority(self, tenant_id: str) -> int | None:
        """The `priority` of a tenant's requests for the upstream; None: it gets none."""
        rank = _CLASSES.index(self.admission.account(tenant_id).config.latency_class)
        match self._priority:
            case UpstreamPriority.OFF:
                return None
            case UpstreamPriority.VLLM:
                return rank
            case UpstreamPriority.SGLANG:
                return len(_CLASSES) - 1 - rank

    def cache_salt(self, tenant_id: str) -> str | None:
        """What keeps the tenant's cached prefixes apart, which nobody can guess; None: the upstream is not asked to."""
        if self._salt_key is None:
            return None
        config = self.admission.account(tenant_id).config
        group = config.kv_cache.prefix_sharing_group
        name = f"group {group}" if group else f"tenant {tenant_id} {config.uid}"
        return hmac.new(self._salt_key, name.encode(), "sha256").hexdigest()

    def close(self) -> None:
        self.prompts.close()


class _WindowCollector(Collector):
    """The window's state, read at the time of a scrape."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream

    def collect(self) -> Iterable[Metric]:
        dispatcher = self._upstream.dispatcher
        window, request_table = dispatcher.window, dispatcher.request_table
        for name, text, value in (
            ("upstream_up", "1 if the upstream was usable when last probed.", self._upstream.problem is None),
            ("queued_requests", "Requests that wait here for their turn.", request_table.num_waiting),
            ("inflight_requests", "Requests at the upstream.", window.num_in_flight),
            ("inflight_tokens", "Their prompts, outputs and expected outputs.", window.num_tokens),
            ("unstarted_requests", "Of these, without a first chunk.", window.num_unstarted),
            ("unstarted_tokens", "Prompt tokens of those.", window.num_unstarted_tokens),
            ("window_batch_tokens", "Prompt tokens that may be unstarted, as learned.", window.batch_tokens),
            ("window_kv_tokens", "Tokens that may be in flight; Inf: unbounded.", window.kv_tokens),
        ):
            yield GaugeMetricFamily(f"evenhand_sidecar_{name}", text, value=float(value))


SIDECAR = web.AppKey("sidecar", SidecarService)
