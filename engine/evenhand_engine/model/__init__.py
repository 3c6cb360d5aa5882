"""Model files and the decoder: from a name to weights in memory, and from one step's input to logits.

Lives in the engine core process; the HTTP process uses `source` and `config` alone, before torch is loaded.
"""
