"""Results: what a computed batch changes: tokens are appended, blocks become known, requests end."""

from collections.abc import Sequence

from evenhand_engine.scheduler.batch import Batch, ScheduledRequest
from evenhand_engine.scheduler.ledger import Ledger
from evenhand_engine.scheduler.request import FinishReason, Request, RequestOutput, Sampled
from evenhand_engine.scheduler.request_table import RequestTable
from evenhand_engine.scheduler.speculation import Speculation

_FROM_RESULTS = (FinishReason.STOP, FinishReason.GRAMMAR, FinishReason.ERROR)
"""Ends that a result brings, while the next step may be in flight."""


class Results:
    """Takes in results, in the order in which batches were planned."""

    def __init__(self, request_table: RequestTable, ledger: Ledger, speculation: Speculation) -> None:
        self._request_table = request_table
        self._speculation = speculation
        self._ledger = ledger

    def take(self, batch: Batch, requests: Sequence[Request], sampled: Sequence[Sampled]) -> None:
        """The batch, whose its items are, and what was sampled for each of them with samples, in order."""
        items, num_decodes = batch.scheduled, batch.num_decodes
        self._take_decodes(items[:num_decodes], requests[:num_decodes], sampled[:num_decodes])
        results = iter(sampled[num_decodes:])
        for item, request in zip(items[num_decodes:], requests[num_decodes:], strict=True):
            self._take(item, request, next(results) if item.num_samples else None)

    def _take_decodes(
        self, items: Sequence[ScheduledRequest], requests: Sequence[Request], results: Sequence[Sampled]
    ) -> None:
        """Of every stream in every step. Nearly each has one token, fills no block and does not end: then this is all of
        `_take` that there is to do."""
        block_size, outputs = self._request_table.blocks.block_size, self._request_table.outputs
        for item, request, result in zip(items, requests, results, strict=True):
            tokens, token_ids = request.token_ids, result.token_ids
            if (
                len(token_ids) == item.num_samples == 1
                and token_ids[0] not in request.sampling_params.stop_token_ids
                and (item.num_computed_tokens + 1) % block_size
                and len(tokens) + 1 < request.max_num_tokens
                and request.finish_reason is None
                and not request.guess
            ):
                tokens.append(token_ids[0])
                request.num_in_flight_tokens -= 1
                outputs.append(
                    RequestOutput(request_id=request.request_id, token_ids=token_ids, logprobs=result.logprobs)
                )
            else:
                self._take(item, request, result)

    def _take(self, item: ScheduledRequest, request: Request, result: Sampled | None) -> None:
        if request.finish_reason is not None:
            if result is not None and request.finish_reason in _FROM_RESULTS:
                self.correct(request, item.first_output + 1, item.first_output)
            return
        end, blocks = item.num_computed_tokens + item.num_scheduled_tokens, self._request_table.blocks
        if result is not None and len(result.token_ids) < item.num_samples:
            end -= self._reject(request, item.num_samples - len(result.token_ids))
        if end % blocks.block_size == 0 or item.num_scheduled_tokens > 1:
            blocks.commit(request, item.num_computed_tokens, min(end, request.num_computed_tokens))
        if result is not None:
            self._append(request, result)

    def fail(self, batch: Batch, requests: Sequence[Request]) -> None:
        """The batch could not be computed. What its requests were charged for is given back where it was sampled only;
        nothing of it enters the prefix cache."""
        for item, request in zip(batch.scheduled, requests, strict=True):
            if request.finish_reason is None:
                request.num_in_flight_tokens -= item.num_samples
                self._request_table.finish(request, FinishReason.ERROR)
            if item.num_samples:
                self.correct(request, item.first_output + 1, item.first_output)

    def correct(self, request: Request, charged: int, end: int) -> None:
        """Outputs were charged up to the position `charged`, and there are some up to `end`. A step charges one when it is planned."""
        if charged != end:
            self._ledger.correct_outputs(self._request_table.tenant(request.tenant_id), request, charged, end)

    def _append(self, request: Request, result: Sampled) -> None:
        """Append what was sampled, up to the token that ends the request."""
        tokens, params, token_ids, logprobs = (
            request.token_ids,
            request.sampling_params,
            result.token_ids,
            result.logprobs,
        )
        first, reason = len(tokens), None
        prompt_logprobs = result.prompt_logprobs
        if prompt_logprobs and request.num_output_tokens:  # told before a preemption
            prompt_logprobs = ()
        request.num_in_flight_tokens -= len(token_ids)
        for token_id in token_ids:
            tokens.append(token_id)
            if token_id in params.stop_token_ids and request.num_output_tokens > params.min_tokens:
                reason = FinishReason.STOP
                break
            if len(tokens) >= request.max_num_tokens:
                reason = FinishReason.LENGTH
                break
        num_taken = len(tokens) - first
        if num_taken != 1:
            self.correct(request, first + 1, first + num_taken)
        if num_taken < len(token_ids):
            token_ids, logprobs = token_ids[:num_taken], logprobs[:num_taken]
        if request.guess or num_taken > 1:
            self._speculation.learn(request, token_ids)
        if not token_ids:
            self._request_table.finish(request, result.failure)
        elif reason is not None:
            self._request_table.finish(request, reason, token_ids, logprobs, prompt_logprobs)
        else:
            self._request_table.outputs.append(
                RequestOutput(
                    request_id=request.request_id,
                    token_ids=token_ids,
                    logprobs=logprobs,
                    prompt_logprobs=prompt_logprobs,
                )
            )

    def _reject(self, request: Request, num_tokens: int) -> int:
        """Take back the last sampled positions of a batch: drafts that were wrong, or logits without a token."""
        request.num_in_flight_tokens -= num_tokens
        request.num_computed_tokens -= num_tokens
        return num_tokens
