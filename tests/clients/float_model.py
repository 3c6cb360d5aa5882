"""Write the default model as a directory that transformers reads: float32, and with a chat template that takes tools.

Run by the project's Python: the default model is a GGUF file, whose blocks transformers does not read.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from evenhand_engine.model.source import resolve_model_dir
from evenhand_engine.model.weights import Checkpoint
from evenhand_kernels.quantized import widened

TOOLS = (
    "{%- if tools %}{{ '<|im_start|>system\\nTools:\\n' }}{% for tool in tools %}{{ tool | tojson }}{{ '\\n' }}{% endfor %}"
    "{{ 'Call one in <tool_call></tool_call>.<|im_end|>\\n' }}{% endif -%}"
)


def main() -> None:
    source, target = resolve_model_dir(None), Path(sys.argv[1])
    for name in ("tokenizer.json", "generation_config.json"):
        shutil.copy(source / name, target)
    config = json.loads((source / "config.json").read_text()) | {"dtype": "float32"}
    (target / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((source / "tokenizer_config.json").read_text())
    tokenizer["chat_template"] = TOOLS + tokenizer["chat_template"]
    (target / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
    with Checkpoint(source) as checkpoint:
        tensors = {name: widened(checkpoint.take(name, *p.shape)).contiguous() for name, p in model.named_parameters()}
    save_file(tensors, str(target / "model.safetensors"), metadata={"format": "pt"})


if __name__ == "__main__":
    main()
