"""DeviceRunner: computes batches on a GPU, or on the emulated one, while the host plans the next.

    submit   host: lay out ─▶ one copy ─▶ forward (a recorded graph for decodes) ─▶ sample ─▶ copy back ─▶ event
    collect  wait for the event of the oldest step

Nothing between the copy and the event waits for the host, and no launch depends on a sampled token: what a step samples
is the next step's input on the device, before the host has seen it. So two steps are in flight, and the device never waits.
"""

from collections import deque
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from evenhand_engine.config import SchedulerSettings
from evenhand_engine.core.device_adjustments import Samples
from evenhand_engine.core.device_sampling import SamplingStep, StepSampler
from evenhand_engine.core.device_seats import DeviceSeats
from evenhand_engine.core.step_layout import DeviceStep, HostStep, StepLayout
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
    """A graph of the decodes of up to `layout.num_requests` requests."""

    graph: Graph
    layout: StepLayout
    shape: WorkShape


class DeviceRunner:
    """Implements `Runner`."""

    def __init__(self, decoder: Decoder, kernels: CudaKernels, settings: SchedulerSettings, vocab_size: int) -> None:
        self.settings = settings
        self._decoder, self._kernels = decoder, kernels
        self._device: Device = kernels.device
        self._block_size = settings.block_size
        torch_device = self._device.torch_device
        self._seats = DeviceSeats(settings, torch_device)
        sampler = DeviceSampler(self._device, kernels.dtype, vocab_size, num_penalty_seats=settings.max_num_seqs)
        self._sampler = StepSampler(self._device, sampler, self._seats, settings)
        num_rows, num_seqs = settings.max_num_batched_tokens, settings.max_num_seqs
        largest = StepLayout(
            num_rows=max(num_rows, num_seqs),
            num_requests=num_seqs,
            num_samples=num_seqs,
            num_plan_words=kernels.work.shape(num_seqs, max(num_rows, num_seqs)).words,
            num_new_blocks=num_seqs * self._seats.max_num_blocks,
        )
        self._host = deque(
            (self._device.pinned(largest.num_words, dtype=torch.int32), self._device.record())
            for _ in range(PIPELINE_DEPTH + 1)
        )
        self._memory = torch.zeros(largest.num_words, dtype=torch.int32, device=torch_device)
        self._logits = torch.zeros(num_seqs, vocab_size, dtype=kernels.dtype, device=torch_device)
        self._graphs: dict[int, _RecordedStep] = {}
        self._steps: deque[SamplingStep] = deque()

    @property
    def pipeline_depth(self) -> int:
        return PIPELINE_DEPTH

    def submit(self, batch: Batch) -> None:
        with self._device.stream(), torch.inference_mode():
            self._seats.take_in(batch)
            self._sampler.take_in(batch)
            recorded = self._recorded(batch)
            if recorded is not None:
                step, samples = self._copy(batch, recorded.layout, recorded.shape)
                recorded.graph.replay()
                logits = self._logits
            else:
                step, samples, shape = self._copy_exactly(batch)
                logits = self._forward(step, shape, batch.num_decodes)
            self._steps.append(self._sampler.sample(samples, step, logits))

    def collect(self) -> list[Sampled]:
        return self._steps.popleft().wait()

    def warm_up(self) -> None:
        """Run the largest step, and record the graphs of decodes, so that no user waits for what happens at first use."""
        run_largest_step(self, self.settings)
        for size in graph_sizes(self.settings.max_num_seqs):
            self._record(size)

    # -- laying out

    def _copy_exactly(self, batch: Batch) -> tuple[DeviceStep, Samples, WorkShape]:
        num_rows, num_requests = batch.num_tokens, len(batch.scheduled)
        bound = self._kernels.work.shape(num_requests, num_rows)
        layout = StepLayout(num_rows, num_requests, _num_samples(batch), bound.words, _num_new_blocks(batch))
        host, memory = self._begin(layout)
        samples = self._lay_out(batch, host)
        shape = self._kernels.work.write(host.part("plan"), host.part("seq_lens"), host.part("cu_seqlens_q"))
        return self._send(memory, layout), samples, shape

    def _copy(self, batch: Batch, padded: StepLayout, shape: WorkShape) -> tuple[DeviceStep, Samples]:
        """Into the places where a graph reads."""
        layout = replace(padded, num_new_blocks=_num_new_blocks(batch))
        host, memory = self._begin(layout)
        samples = self._lay_out(batch, host)
        self._kernels.work.write(host.part("plan"), host.part("seq_lens"), host.part("cu_seqlens_q"), shape)
        return self._send(memory, layout), samples

    def _begin(self, layout: StepLayout) -> tuple[HostStep, Tensor]:
        """Host memory that no copy reads any more."""
        memory, copied = self._host.popleft()
        copied.wait()
        return HostStep(memory.numpy(), layout), memory

    def _send(self, memory: Tensor, layout: StepLayout) -> DeviceStep:
        size = layout.num_words
        self._memory[:size].copy_(memory[:size], non_blocking=True)
        self._host.append((memory, self._device.record()))
        step = DeviceStep(self._memory, layout)
        if layout.num_new_blocks:
            self._seats.apply_new_blocks(step)
        return step

    def _lay_out(self, batch: Batch, host: HostStep) -> Samples:
        """Fill all parts but the plan; padding reads and writes where nobody does."""
        items, seats = batch.scheduled, self._seats
        num_requests = len(items)
        seat = np.array([item.seat for item in items], np.int64)
        start = np.array([item.num_computed_tokens for item in items], np.int64)
        count = np.array([item.num_scheduled_tokens for item in items], np.int64)
        num_samples = np.array([item.num_samples for item in items], np.int64)
        assert num_samples.max(initial=0) <= 1, "drafts are not planned for a device"

        end = start + count
        cu_seqlens_q = host.part("cu_seqlens_q")
        cu_seqlens_q[0] = 0
        np.cumsum(count, out=cu_seqlens_q[1 : num_requests + 1])
        num_rows = int(cu_seqlens_q[num_requests])
        cu_seqlens_q[num_requests + 1 :] = num_rows
        host.fill("seats", seat, padding=seats.nobody)
        host.fill("seq_lens", end, padding=0)

        row_seat, position = seat, start
        if num_rows > num_requests:
            owner = np.arange(num_requests).repeat(count)
            row_seat = seat[owner]
            position = np.arange(num_rows) + (start - cu_seqlens_q[:num_requests])[owner]
        host.fill("row_seats", row_seat, padding=seats.nobody)
        host.fill("positions", position, padding=0)
        host.fill("token_ids", seats.token_ids(row_seat, position), padding=0)

        sampled = num_samples.nonzero()[0]
        samples = Samples(seat[sampled], end[sampled] - seats.num_prompt_tokens[seat[sampled]])
        host.fill("logits_indices", cu_seqlens_q[sampled + 1] - 1, padding=0)
        self._sampler.write(samples, host)
        seats.write_new_blocks(items, host)
        return samples

    # -- computing

    def _forward(self, step: DeviceStep, shape: WorkShape, num_decodes: int) -> Tensor:
        """Logits of the rows that are sampled, [the layout's num_samples, vocab_size]."""
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
        """The smallest graph that the batch fits, if all of it are decodes."""
        if batch.num_decodes < len(batch.scheduled):
            return None
        return next((self._graphs[size] for size in self._graphs if size >= len(batch.scheduled)), None)

    def _record(self, size: int) -> None:
        """Record the decodes of `size` requests; while it is recorded, all of them are padding."""
        shape = self._kernels.work.shape(size, size)
        layout = StepLayout(size, size, size, shape.words)
        empty = Batch(0, (), 0)

        def compute() -> None:
            self._logits[:size].copy_(self._forward(DeviceStep(self._memory, layout), shape, size))

        with self._device.stream(), torch.inference_mode():
            self._copy(empty, layout, shape)
            compute()
            self._graphs[size] = _RecordedStep(self._device.capture(compute), layout, shape)


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


def _num_new_blocks(batch: Batch) -> int:
    return sum([len(item.new_block_ids) for item in batch.scheduled if item.new_block_ids])
