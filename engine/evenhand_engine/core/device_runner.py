"""DeviceRunner: computes batches on a GPU, or on the emulated one, while the host plans the next.

    submit   host: lay out ─▶ one copy ─▶ forward (a recorded graph for decodes) ─▶ sample ─▶ copy back ─▶ event
    collect  wait for the event of the oldest step

Nothing between the copy and the event waits for the host, and no launch depends on a sampled token: what a step samples
is the next step's input on the device, before the host has seen it. So two steps are in flight, and the device never waits.

A mask of a grammar does depend on the token before. Then the host waits for that between the forward pass and the sampling,
while the device has this forward pass to do, and not again in `collect`: once a step, as always. Drafts are guessed from
known tokens, so with them each step is collected before the next is planned.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evenhand_engine.config import SchedulerSettings
from evenhand_engine.core.device_sampling import Planned, SamplingStep, StepSampler
from evenhand_engine.core.device_seats import DeviceSeats, Samples
from evenhand_engine.core.followers import Mask
from evenhand_engine.core.prompt_logprobs import PromptLogprobs, ScoredPart
from evenhand_engine.core.step_layout import DeviceStep, HostStep, StepLayout
from evenhand_engine.core.structures import StructuredStep, Structures
from evenhand_engine.core.warm_up import run_largest_step
from evenhand_engine.model.decoder import Decoder, ModelInput, forward
from evenhand_engine.scheduler.batch import Batch
from evenhand_engine.scheduler.request import Sampled
from evenhand_kernels.cuda.kernels import CudaKernels
from evenhand_kernels.cuda.sampling import DeviceSampler
from evenhand_kernels.cuda.work import WorkShape
from evenhand_kernels.device import Device, Graph
from evenhand_kernels.kernels import AttentionBatch

PIPELINE_DEPTH = 2


@dataclass(frozen=True, slots=True)
class _RecordedStep:
    """A graph of decodes with up to `step.layout.num_rows` tokens, drafts among them."""

    graph: Graph
    step: DeviceStep
    shape: WorkShape


class DeviceRunner:
    """Implements `Runner`."""

    def __init__(
        self,
        decoder: Decoder,
        kernels: CudaKernels,
        settings: SchedulerSettings,
        vocab_size: int,
        structures: Structures,
    ) -> None:
        """`structures`: grammars of requests, told before they are scheduled."""
        self.settings = settings
        self._decoder, self._kernels = decoder, kernels
        self._device: Device = kernels.device
        self._block_size = settings.block_size
        torch_device = self._device.torch_device
        self._seats = DeviceSeats(settings, torch_device)
        sampler = DeviceSampler(self._device, kernels.dtype, vocab_size, num_penalty_seats=settings.max_num_seqs)
        self._sampler = StepSampler(self._device, sampler, self._seats, settings)
        self._structures, self._prompt_logprobs = structures, PromptLogprobs()
        num_rows, num_seqs = settings.max_num_batched_tokens, settings.max_num_seqs
        largest = StepLayout(
            num_rows=max(num_rows, num_seqs),
            num_requests=num_seqs,
            num_samples=settings.max_num_outputs,
            num_plan_words=kernels.work.shape(num_seqs, max(num_rows, num_seqs)).words,
            num_scored=num_rows,
        )
        num_words = largest.num_words_with(num_seqs * self._seats.max_num_blocks)
        self._host = deque(
            (self._device.pinned(num_words, dtype=torch.int32), self._device.record())
            for _ in range(PIPELINE_DEPTH + 1)
        )
        self._memory = torch.zeros(num_words, dtype=torch.int32, device=torch_device)
        self._logits = torch.zeros(num_seqs, vocab_size, dtype=kernels.dtype, device=torch_device)
        self._graphs: dict[int, _RecordedStep] = {}
        self._steps: deque[SamplingStep] = deque()

    @property
    def pipeline_depth(self) -> int:
        return 1 if self.settings.num_speculative_tokens else PIPELINE_DEPTH

    def submit(self, batch: Batch) -> None:
        with self._device.stream(), torch.inference_mode():
            self._seats.take_in(batch)
            self._sampler.take_in(batch)
            scored, structured = self._prompt_logprobs.begin(batch), self._structures.begin(batch)
            recorded = self._recorded(batch)
            if recorded is not None:
                step, logits = recorded.step, self._logits
                samples = self._copy(batch, step, recorded.shape)
                recorded.graph.replay()
            else:
                step, samples, shape = self._copy_exactly(batch, scored)
                logits = self._forward(step, shape, batch.num_decodes)
            planned = Planned(batch, samples, scored, structured)
            self._steps.append(self._sampler.sample(planned, step, logits, self._masks(structured)))

    def collect(self) -> list[Sampled]:
        step = self._steps.popleft()
        results = step.wait()
        if self.settings.num_speculative_tokens:
            self._learn(step.planned.batch, results)
        return results

    def warm_up(self) -> None:
        """Record the graphs of decodes and run the largest step, so that no user waits for what happens at first use.

        The largest graph first: the others find room in its memory. The largest step last: to record a graph gives back what
        memory is not in use, and this step takes again what prompts need.
        """
        sizes = graph_sizes(self.settings.max_num_seqs)
        recorded = {size: self._record(size) for size in reversed(sizes)}
        self._graphs = {size: recorded[size] for size in sizes}
        run_largest_step(self, self.settings, scores_prompt=True)

    def _masks(self, structured: StructuredStep | None) -> dict[int, Mask]:
        """By row. Those of a token can be made when the one before it has come."""
        return {} if structured is None else structured.masks(self._catch_up)

    def _catch_up(self) -> None:
        """Wait for all steps in flight."""
        for step in self._steps:
            step.wait()

    def _learn(self, batch: Batch, results: list[Sampled]) -> None:
        """Which drafts were right is known here; what is laid out next goes on from there."""
        items = [item for item in batch.scheduled if item.num_samples]
        for item, result in zip(items, results, strict=True):
            self._seats.append(item.seat, item.first_output, result.token_ids)
        pairs = [(item.seat, token) for item, result in zip(items, results, strict=True) for token in result.token_ids]
        with self._device.stream(), torch.inference_mode():
            self._sampler.count([seat for seat, _ in pairs], [token for _, token in pairs])

    # -- laying out

    def _copy_exactly(self, batch: Batch, scored: Sequence[ScoredPart]) -> tuple[DeviceStep, Samples, WorkShape]:
        num_rows, num_requests = batch.num_tokens, len(batch.scheduled)
        bound = self._kernels.work.shape(num_requests, num_rows)
        num_scored = sum(len(part.rows) for part in scored)
        layout = StepLayout(num_rows, num_requests, _num_samples(batch), bound.words, num_scored)
        step, (host, memory) = DeviceStep(self._memory, layout), self._begin(layout)
        samples, num_new_blocks = self._lay_out(batch, scored, host)
        shape = self._kernels.work.write(host.part("plan"), host.part("seq_lens"), host.part("cu_seqlens_q"))
        self._send(memory, step, num_new_blocks)
        return step, samples, shape

    def _copy(self, batch: Batch, step: DeviceStep, shape: WorkShape) -> Samples:
        """Into the places where a graph reads."""
        host, memory = self._begin(step.layout)
        samples, num_new_blocks = self._lay_out(batch, (), host)
        self._kernels.work.write(host.part("plan"), host.part("seq_lens"), host.part("cu_seqlens_q"), shape)
        self._send(memory, step, num_new_blocks)
        return samples

    def _begin(self, layout: StepLayout) -> tuple[HostStep, Tensor]:
        """Host memory that no copy reads any more; if it is not sent, it is the next one again."""
        memory, copied = self._host[0]
        copied.wait()
        return HostStep(memory.numpy(), layout), memory

    def _send(self, memory: Tensor, step: DeviceStep, num_new_blocks: int) -> None:
        size = step.layout.num_words_with(num_new_blocks)
        self._memory[:size].copy_(memory[:size], non_blocking=True)
        self._host[0] = (memory, self._device.record())
        self._host.rotate(-1)
        if num_new_blocks:
            self._seats.apply_new_blocks(step, num_new_blocks)

    def _lay_out(self, batch: Batch, scored: Sequence[ScoredPart], host: HostStep) -> tuple[Samples, int]:
        """Fill all parts but the plan; how many blocks are new."""
        samples = self._seats.lay_out(batch, scored, host)
        self._sampler.write(samples, host)
        return samples, self._seats.write_new_blocks(batch.scheduled, host)

    # -- computing

    def _forward(self, step: DeviceStep, shape: WorkShape, num_decodes: int) -> Tensor:
        """Logits of the rows that are sampled and scored, [the layout's num_samples and num_scored, vocab_size]."""
        positions, row_seats = step.part("positions"), step.part("row_seats")
        block_tables = self._seats.block_tables
        blocks = block_tables[row_seats, (positions // self._block_size).long()]
        attention = AttentionBatch(
            positions=positions,
            slot_mapping=blocks * self._block_size + positions % self._block_size,
            block_table=block_tables[step.part("seats")],
            seq_lens=step.part("seq_lens"),
            cu_seqlens_q=step.part("cu_seqlens_q"),
            num_decodes=num_decodes,
        )
        model_input = ModelInput(
            input_ids=self._seats.resolve(step.part("token_ids"), row_seats),
            plan=self._kernels.work.plan_of(attention, step.part("plan"), shape),
            logits_indices=step.part("logits_indices"),
        )
        return forward(self._decoder, model_input)

    def _recorded(self, batch: Batch) -> _RecordedStep | None:
        """The smallest graph that the batch fits, if all of it are decodes: one of so many rows takes any of no more."""
        if batch.num_decodes < len(batch.scheduled):
            return None
        num_rows = batch.num_tokens if self.settings.num_speculative_tokens else batch.num_decodes
        return next((self._graphs[size] for size in self._graphs if size >= num_rows), None)

    def _record(self, size: int) -> _RecordedStep:
        """Record the decodes of `size` requests; while it is recorded, all of them are padding."""
        shape = self._kernels.work.shape(size, size)
        empty, step = Batch(0, (), 0), DeviceStep(self._memory, StepLayout(size, size, size, shape.words))

        def compute() -> None:
            self._logits[:size].copy_(self._forward(step, shape, size))

        with self._device.stream(), torch.inference_mode():
            self._copy(empty, step, shape)
            compute()
            return _RecordedStep(self._device.capture(compute), step, shape)


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Numbers of requests for which decodes are recorded: each wastes at most an eighth above 16, a half below."""
    sizes = [size for size in (1, 2, 4, 8) if size < max_num_seqs]
    size = 16
    while size < max_num_seqs:
        sizes.append(size)
        size += max(8, size // 8 // 8 * 8)
    return [*sizes, max_num_seqs]


def _num_samples(batch: Batch) -> int:
    return sum(item.num_samples for item in batch.scheduled)
