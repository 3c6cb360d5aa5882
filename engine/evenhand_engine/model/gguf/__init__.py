"""GGUF files, turned once into a Hugging Face style directory: keys, tensors and the tokenizer as llama.cpp reads them."""
