"""Perplexity of the default model, or another, by the form of its weights, of its KV cache and of activations.

The text is the project's own licence. float32 weights are those of the checkpoint, widened: what a row differs from that
row by is what its form costs.
"""

import math

import common
import torch
from tokenizers import Tokenizer
from torch import Tensor

from evenhand_engine.model.cache import cache_dir
from evenhand_engine.model.config import load_model_config
from evenhand_engine.model.decoder import Decoder, ModelInput, build_decoder, forward
from evenhand_engine.model.precision import ACTIVATION_DTYPES, DTYPES, Precision
from evenhand_engine.model.source import resolve_model_dir
from evenhand_engine.model.weights import load_weights
from evenhand_kernels.cpu.kernels import CpuKernels
from evenhand_kernels.kernels import AttentionBatch, KvCacheShape

TEXT = common.DATA.parents[1] / "LICENSE"
MAX_TOKENS, CHUNK, BLOCK_SIZE = 2048, 256, 16
FORMS = {
    "float32": Precision(torch.float32),
    "as it comes": Precision(),
    "bfloat16": Precision(torch.bfloat16),
    "float16": Precision(torch.float16),
    "int8": Precision(torch.float32, int8=True),
}


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--model", help="a Hugging Face directory, hub id or GGUF file; default: the default model")
    options = parser.parse_args()
    model_dir = resolve_model_dir(options.model)
    config = load_model_config(model_dir)
    tokens = Tokenizer.from_file(str(model_dir / "tokenizer.json")).encode(TEXT.read_text()).ids
    token_ids = torch.tensor(tokens[: 512 if options.quick else MAX_TOKENS], dtype=torch.int32)
    torch.set_num_threads(1)
    rows = []
    for form, precision in FORMS.items():
        for activations, activation_dtype in ACTIVATION_DTYPES.items():
            kernels = CpuKernels(cache_dir() / "kernels", activation_dtype=activation_dtype)
            weights = load_weights(model_dir, config, precision, kernels)
            for kv_dtype in DTYPES if (form, activations) == ("float32", "float32") else ("float32",):
                cache = KvCacheShape(-(-len(token_ids) // BLOCK_SIZE), BLOCK_SIZE, DTYPES[kv_dtype])
                decoder = build_decoder(config, weights, kernels, cache, len(token_ids))
                rows.append((form, kv_dtype, activations, _perplexity(decoder, token_ids)))
    common.print_table(
        f"perplexity over {len(token_ids)} tokens of LICENSE",
        ["weights", "KV cache", "activations", "perplexity"],
        [[*names, f"{value:.4f}"] for *names, value in rows],
    )
    common.finish("perplexity", {" ".join(names): value for *names, value in rows})


def _perplexity(decoder: Decoder, token_ids: Tensor) -> float:
    """exp of the mean negative log likelihood of each token but the first, given all before it."""
    total = 0.0
    for start in range(0, len(token_ids) - 1, CHUNK):
        end = min(start + CHUNK, len(token_ids) - 1)
        logits = forward(decoder, _input(decoder, token_ids, start, end)).double()
        total -= logits.log_softmax(-1)[torch.arange(end - start), token_ids[start + 1 : end + 1].long()].sum().item()
    return math.exp(total / (len(token_ids) - 1))


def _input(decoder: Decoder, token_ids: Tensor, start: int, end: int) -> ModelInput:
    """Tokens [start, end) of the only request, whose blocks lie in order."""
    positions = torch.arange(start, end, dtype=torch.int32)
    attention = AttentionBatch(
        positions=positions,
        slot_mapping=positions,
        block_table=torch.arange(-(-len(token_ids) // BLOCK_SIZE), dtype=torch.int32)[None],
        seq_lens=torch.tensor([end], dtype=torch.int32),
        cu_seqlens_q=torch.tensor([0, end - start], dtype=torch.int32),
    )
    wanted = torch.arange(end - start, dtype=torch.int32)
    return ModelInput(token_ids[start:end].contiguous(), decoder.kernels.plan(attention), wanted)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
