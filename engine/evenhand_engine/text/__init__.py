"""Text to token ids and back: chat templates, tokenizer, incremental detokenizer with stop strings."""
