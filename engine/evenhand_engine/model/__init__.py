"""Model files and the decoder: from a name to weights in memory, and from one step's input to logits.

    which                   source: a folder, a file, or default_model; gguf: such a file becomes a folder; cache, where that is kept
    what it is              config, from config_json, rope_config and packed_format; precision: in which form it is held; memory: whether it fits
    weights                 weights: as they are stored: packed_int (AWQ, GPTQ), fp8_weights; sharding: the part of one device
    computing               decoder, rope
    telling how far it is   progress

Lives in the engine core process; the HTTP process uses `source` and `config` alone, before torch is loaded.
"""
