"""Front: what a process at the sidecar's public port has: its connection to the upstream, and the ways to whoever decides."""

import hmac
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

from aiohttp import web

from evenhand_engine.backends.upstream_connection import UpstreamConnection
from evenhand_engine.frontend.door import Door
from evenhand_engine.frontend.fair_executor import FairExecutor
from evenhand_engine.frontend.settings import ServerSettings
from evenhand_engine.sidecar.counting import PromptCounter
from evenhand_engine.sidecar.ticket import Tickets
from evenhand_engine.text.tokenizer import Tokenizer
from evenhand_policy.config import LatencyClass, TenantConfig

T = TypeVar("T")

_THREADS = 2  # so that one is left for others while a tenant uses the other
_INLINE_BYTES = 32 * 1024  # looked at in about the time that a thread needs to wake
_CLASSES = tuple(LatencyClass)
_MANAGEMENT = {  # of vLLM, SGLang and llama.cpp: for whoever runs the engine, on its own port
    *("/sleep", "/wake_up", "/collective_rpc", "/reset_prefix_cache", "/reset_mm_cache", "/scale_elastic_ep"),
    *("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/start_profile", "/stop_profile", "/flush_cache"),
    *("/update_weights_from_disk", "/update_weights_from_tensor", "/update_weights_from_distributed"),
    *("/init_weights_update_group", "/release_memory_occupation", "/resume_memory_occupation", "/pause", "/resume"),
    *("/load_lora_adapter", "/unload_lora_adapter", "/set_internal_state", "/abort_request", "/abort_requests"),
    *("/configure_logging", "/clear_hicache_storage_backend", "/props", "/slots", "/lora-adapters"),
    *("/pause_generation", "/continue_generation", "/models/load", "/models/unload", "/freeze_gc"),
    *("/get_server_info", "/server_info", "/health_generate", "/update_weights_from_ipc", "/update_weight_version"),
    *("/get_weights_by_name", "/slow_down", "/init_weights_send_group_for_remote_instance"),
    *("/send_weights_to_remote_instance", "/set_trace_level", "/load_lora_adapter_from_tensors"),
    *("/start_expert_distribution_record", "/stop_expert_distribution_record", "/dump_expert_distribution_record"),
    *("/open_session", "/close_session", "/hicache", "/destroy_weights_update_group", "/reset_encoder_cache"),
    *("/update_weights", "/init_weight_transfer_engine", "/is_scaling_elastic_ep", "/scale_up"),
}


class UpstreamPriority(StrEnum):
    """Whose sense of a body's `priority` is used to pass on a tenant's class."""

    OFF = "off"
    VLLM = "vllm"  # the lowest goes first
    SGLANG = "sglang"  # the highest goes first


@dataclass(frozen=True, slots=True, kw_only=True)
class PassingOptions:
    """What is set in bodies that are passed on.

    Attributes:
        priority: whether a tenant's class is, and how.
        salt_key: of the salts of prefix caches, the same in all processes; None: none are set.
    """

    priority: UpstreamPriority = UpstreamPriority.OFF
    salt_key: bytes | None = None

    def upstream_priority(self, tenant: TenantConfig) -> int | None:
        """The `priority` of a tenant's requests for the upstream; None: it gets none."""
        rank = _CLASSES.index(tenant.latency_class)
        match self.priority:
            case UpstreamPriority.OFF:
                return None
            case UpstreamPriority.VLLM:
                return rank
            case UpstreamPriority.SGLANG:
                return len(_CLASSES) - 1 - rank

    def cache_salt(self, tenant_id: str, tenant: TenantConfig) -> str | None:
        """What keeps the tenant's cached prefixes apart, which nobody can guess; None: the upstream is not asked to."""
        if self.salt_key is None:
            return None
        group = tenant.kv_cache.prefix_sharing_group
        name = f"group {group}" if group else f"tenant {tenant_id} {tenant.uid}"
        return hmac.new(self.salt_key, name.encode(), "sha256").hexdigest()


class Front:
    """What handlers of the public port need.

    Attributes:
        door: to whoever owns what tenants share.
        tickets: from whoever says who is sent next.
        prompts: counts prompts before the upstream does.
    """

    def __init__(
        self,
        settings: ServerSettings,
        connection: UpstreamConnection,
        door: Door,
        tickets: Tickets,
        options: PassingOptions,
        tokenizer: Tokenizer | None,
    ) -> None:
        self.settings = settings
        self.connection = connection
        self.door = door
        self.tickets = tickets
        self.options = options
        self._executor = FairExecutor(_THREADS)
        self.prompts = PromptCounter(connection, tokenizer, self._executor)

    @property
    def max_model_len(self) -> int:
        """The upstream's context."""
        return self.connection.settings.max_model_len

    async def compute(self, tenant_id: str, num_bytes: int, function: Callable[[], T]) -> T:
        """The result of `function`, which looks at so many bytes: at many off the event loop, and in the tenant's turn."""
        return function() if num_bytes <= _INLINE_BYTES else await self._executor.run(tenant_id, function)

    def close(self) -> None:
        self._executor.close()


def is_management(path: str) -> bool:
    """Whether the path changes or reveals the engine for all tenants."""
    parts = [part for part in path.split("/") if part]
    return any("/" + "/".join(parts[:length]) in _MANAGEMENT for length in range(1, len(parts) + 1))


FRONT = web.AppKey("front", Front)
