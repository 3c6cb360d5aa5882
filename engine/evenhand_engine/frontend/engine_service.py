"""EngineService: what a process needs at the public port of our own engine, beside its door to what tenants share."""

import time
from collections.abc import Callable
from typing import TypeVar

from aiohttp import web

from evenhand_engine.backends.backend import Backend, ModelInfo
from evenhand_engine.errors import Refusal
from evenhand_engine.frontend.door import Door
from evenhand_engine.frontend.fair_executor import FairExecutor
from evenhand_engine.frontend.settings import ServerSettings
from evenhand_engine.structured.compiler import Compiler
from evenhand_engine.text.tokenizer import Tokenizer

_TOKENIZER_THREADS = 2
_INLINE_BYTES = 4096  # so little is tokenized in about the time that a thread needs to wake

T = TypeVar("T")


class EngineService:
    """Tokenizes here, and asks its door for the rest."""

    def __init__(
        self, settings: ServerSettings, backend: Backend, tokenizer: Tokenizer, compiler: Compiler, door: Door
    ) -> None:
        self.settings = settings
        self.backend = backend
        self.tokenizer = tokenizer
        self.door = door
        self.created = int(time.time())
        self.compiler = compiler
        self._executor = FairExecutor(_TOKENIZER_THREADS)

    @property
    def info(self) -> ModelInfo:
        return self.backend.info

    @property
    def model_names(self) -> tuple[str, ...]:
        return self.settings.names_of(self.info.model_name)

    def check_model(self, model: str | None) -> None:
        """Raises Refusal 404 unless `model` is one of ours; None is."""
        if model is not None and model not in self.model_names:
            names = ", ".join(self.model_names)
            raise Refusal(
                404, "model_not_found", f"Model {model[:200]!r} is not served here, but {names}.", param="model"
            )

    async def compute(self, tenant_id: str, num_bytes: int, function: Callable[[], T]) -> T:
        """The result of `function`, which turns a body of `num_bytes` into tokens or back.

        A large one is worked on off the event loop and in the tenant's turn.
        """
        if num_bytes <= _INLINE_BYTES:
            return function()
        return await self.compute_aside(tenant_id, function)

    async def compute_aside(self, tenant_id: str, function: Callable[[], T]) -> T:
        """The result of `function`, which may take long: off the event loop and in the tenant's turn."""
        return await self._executor.run(tenant_id, function)

    def close(self) -> None:
        self._executor.close()


ENGINE = web.AppKey("engine", EngineService)
