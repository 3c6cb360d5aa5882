"""PromptCounter: how many tokens a body's prompt has, before the upstream says it in a usage.

In this order: token ids in the body; a tokenizer of ours, if one was given; the upstream's own, asked only where a limit of
the policy depends on the count; the body's bytes, by what was learned of the tenant's last ones.
"""

import aiohttp
import msgspec

from evenhand_engine.backends.upstream_connection import UpstreamConnection
from evenhand_engine.errors import Refusal
from evenhand_engine.frontend.fair_executor import FairExecutor
from evenhand_engine.openai.bodies import parse_body
from evenhand_engine.openai.prompts import PromptReader
from evenhand_engine.openai.schema import TokenizeRequest
from evenhand_engine.sidecar.body import Body, BytesPerToken
from evenhand_engine.text.tokenizer import Tokenizer

_TIMEOUT = aiohttp.ClientTimeout(total=2.0)
_INLINE_BYTES = 4096  # so little is tokenized in about the time that a thread needs to wake
_COUNTED_BYTES = 4 * 2**20  # a larger body is hardly all text
_LLAMA_CPP = "llama.cpp"


class _Tokenized(msgspec.Struct, frozen=True):
    """vLLM and SGLang count; llama.cpp lists, or for a chat counts as `input_tokens`."""

    count: int | None = None
    tokens: tuple[msgspec.Raw, ...] = ()
    input_tokens: int | None = None

    @property
    def num_tokens(self) -> int | None:
        return self.count or self.input_tokens or len(self.tokens) or None


class PromptCounter:
    """Counts prompts.

    Args:
        upstream: whose tokenizer may be asked.
        tokenizer: of the model; None: there is none here.
        executor: for prompts that take long.

    Attributes:
        bytes_per_token: of each tenant's bodies, for estimates.
    """

    def __init__(self, upstream: UpstreamConnection, tokenizer: Tokenizer | None, executor: FairExecutor) -> None:
        self.bytes_per_token = BytesPerToken()
        self._upstream = upstream
        self._reader = None if tokenizer is None else PromptReader(tokenizer, upstream.settings.max_model_len)
        self._executor = executor

    async def count(self, tenant_id: str, body: Body, *, is_limited: bool) -> int:
        """Tokens of the body's prompt; at least 1. `is_limited`: a limit of the tenant's depends on it."""
        if (num_token_ids := body.num_token_ids) is not None:
            return num_token_ids
        count = None
        if body.num_bytes > _COUNTED_BYTES:
            pass
        elif self._reader is not None and body.fields is not None:
            count = await self._count_here(tenant_id, body, self._reader)
        elif is_limited:
            count = await self._ask_upstream(body)
        return self.bytes_per_token.estimate(tenant_id, body.size) if count is None else max(1, count)

    async def _count_here(self, tenant_id: str, body: Body, reader: PromptReader) -> int | None:
        def count() -> int | None:
            fields = body.prompt_fields()
            tools = fields.pop("tools", None)
            try:
                parsed = parse_body(b"".join(body.expand(msgspec.json.encode(fields))), TokenizeRequest)
                if "messages" in fields:
                    num_tokens = len(reader.chat(parsed))
                elif parsed.prompt is not None:
                    is_special = parsed.add_special_tokens is not False
                    num_tokens = len(reader.text(parsed.prompt, "prompt", add_special_tokens=is_special))
                else:
                    return None
            except Refusal:  # it is the upstream's to refuse; what this tokenizer does not know, it may
                return None
            return num_tokens + (0 if tools is None else self.bytes_per_token.estimate(tenant_id, len(bytes(tools))))

        if body.num_bytes <= _INLINE_BYTES:
            return count()
        return await self._executor.run(tenant_id, count)

    async def _ask_upstream(self, body: Body) -> int | None:
        """By the upstream's own tokenizer; None if it has none that answers."""
        fields, path = body.prompt_fields(), "/tokenize"
        if self._upstream.backend == _LLAMA_CPP:
            if "messages" in fields:
                path = "/v1/chat/completions/input_tokens"
            else:
                fields = {"content": fields.get("prompt", ""), "add_special": True}
        headers = {"Content-Type": "application/json", **self._upstream.authorization}
        try:
            async with self._upstream.session.post(
                self._upstream.url(path),
                data=b"".join(body.expand(msgspec.json.encode(fields))),
                headers=headers,
                timeout=_TIMEOUT,
                allow_redirects=False,
            ) as response:
                if response.status != 200:
                    return None
                return msgspec.json.decode(await response.read(), type=_Tokenized).num_tokens
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError, msgspec.DecodeError):
            return None
