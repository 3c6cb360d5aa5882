"""GGUF files, turned once into a Hugging Face style directory: keys, tensors and the tokenizer as llama.cpp reads them.

`conversion` does it: `file` and its `parts` are what is read, `config` and `pretokenizers` what its keys mean, `tensor_names` which tensors
must be there, `blocks` how their codes are stored.
"""
