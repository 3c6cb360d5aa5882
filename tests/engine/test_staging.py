"""Each step laid out for the model: the same for a step of streams alone as for any other."""

import numpy as np
import torch

from evenhand_engine.config import SchedulerSettings
from evenhand_engine.core.staging import Staging
from evenhand_engine.model.decoder import ModelInput
from evenhand_engine.scheduler.batch import Batch, ScheduledRequest, StartedRequest
from evenhand_engine.scheduler.request import SamplingParams
from evenhand_kernels.reference import ReferenceKernels

SETTINGS = SchedulerSettings(
    block_size=16, max_num_seqs=4, max_model_len=64, num_kv_blocks=16, max_num_batched_tokens=64
)
PARAMS = SamplingParams(max_tokens=9)
PROMPTS = {2: list(range(100, 117)), 0: list(range(200, 205)), 3: list(range(300, 318))}
BLOCKS = {2: (7, 5), 0: (9,), 3: (2, 11)}


def started_staging() -> Staging:
    """Three requests sit, all prompts but their last tokens computed."""
    staging = Staging(SETTINGS, ReferenceKernels())
    staging.fill(
        Batch(
            1,
            tuple(ScheduledRequest(seat, 0, len(prompt) - 1, 0, BLOCKS[seat]) for seat, prompt in PROMPTS.items()),
            started=tuple(
                StartedRequest(seat, f"r{seat}", np.array(prompt, np.int32), len(prompt), PARAMS)  # type: ignore[arg-type]
                for seat, prompt in PROMPTS.items()
            ),
        )
    )
    return staging


def told(model_input: ModelInput) -> dict[str, list[int] | list[list[int]]]:
    batch = model_input.plan.batch
    parts = {
        "input_ids": model_input.input_ids,
        "logits_indices": model_input.logits_indices,
        "positions": batch.positions,
        "slots": batch.slot_mapping,
        "blocks": batch.block_table,
        "lengths": batch.seq_lens,
        "ends": batch.cu_seqlens_q,
    }
    assert all(part.dtype == torch.int32 and part.is_contiguous() for part in parts.values())
    return {name: part.tolist() for name, part in parts.items()}


def test_a_token_for_each_stream() -> None:
    items = (ScheduledRequest(3, 17, 1, 1), ScheduledRequest(2, 16, 1, 1), ScheduledRequest(0, 4, 1, 1))
    assert told(started_staging().fill(Batch(2, items, num_decodes=3))) == {
        "input_ids": [317, 116, 204],
        "logits_indices": [0, 1, 2],
        "positions": [17, 16, 4],
        "slots": [11 * 16 + 1, 5 * 16, 9 * 16 + 4],
        "blocks": [[2, 11], [7, 5], [9, 0]],
        "lengths": [18, 17, 5],
        "ends": [0, 1, 2, 3],
    }


def test_the_next_token_of_the_same_streams_in_another_order() -> None:
    staging = started_staging()
    before = (ScheduledRequest(3, 17, 1, 1), ScheduledRequest(2, 16, 1, 1), ScheduledRequest(0, 4, 1, 1))
    staging.fill(Batch(2, before, num_decodes=3))
    for seat, position, token_id in ((3, 18, 33), (2, 17, 22), (0, 5, 11)):
        staging.append(seat, position, (token_id,))
    items = (ScheduledRequest(0, 5, 1, 1), ScheduledRequest(3, 18, 1, 1), ScheduledRequest(2, 17, 1, 1))
    assert told(staging.fill(Batch(3, items, num_decodes=3))) == {
        "input_ids": [11, 33, 22],
        "logits_indices": [0, 1, 2],
        "positions": [5, 18, 17],
        "slots": [9 * 16 + 5, 11 * 16 + 2, 5 * 16 + 1],
        "blocks": [[9, 0], [2, 11], [7, 5]],
        "lengths": [6, 19, 18],
        "ends": [0, 1, 2, 3],
    }


def test_streams_beside_a_chunk_and_drafts() -> None:
    """Seat 2 guesses two tokens, seat 0 goes on with a token that was sampled, seat 3 computes a part of its prompt again."""
    staging = started_staging()
    staging.append(0, 5, (77,))
    items = (
        ScheduledRequest(2, 16, 3, 3, draft_token_ids=(51, 52)),
        ScheduledRequest(0, 5, 1, 1),
        ScheduledRequest(3, 14, 4, 0),
    )
    assert told(staging.fill(Batch(2, items, num_decodes=2))) == {
        "input_ids": [116, 51, 52, 77, 314, 315, 316, 317],
        "logits_indices": [0, 1, 2, 3],
        "positions": [16, 17, 18, 5, 14, 15, 16, 17],
        "slots": [80, 81, 82, 149, 46, 47, 176, 177],
        "blocks": [[7, 5], [9, 0], [2, 11]],
        "lengths": [19, 6, 18],
        "ends": [0, 3, 4, 8],
    }


def test_rows_that_are_wanted_too_come_in_their_order() -> None:
    items = (ScheduledRequest(2, 16, 1, 1), ScheduledRequest(3, 14, 4, 1))
    model_input = started_staging().fill(Batch(2, items, num_decodes=1), more_rows=[1, 3])
    assert told(model_input)["logits_indices"] == [0, 1, 3, 4]


def test_one_token_that_gives_no_output_is_no_stream() -> None:
    items = (ScheduledRequest(2, 5, 1, 0), ScheduledRequest(0, 4, 1, 1))
    found = told(started_staging().fill(Batch(2, items)))
    assert (found["logits_indices"], found["input_ids"]) == ([1], [105, 204])
