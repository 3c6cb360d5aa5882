"""Text to token ids and back: chat templates, tokenizer, incremental detokenizer with stop strings.

in     chat_template, fill_in_middle ─▶ tokenizer: special_tokens; long_texts in parts
out    text_decoder ─▶ detokenizer: stop strings ─▶ reasoning apart ─▶ tool_calls, tool_call_objects
"""
