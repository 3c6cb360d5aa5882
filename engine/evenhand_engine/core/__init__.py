"""The engine core process: one loop that drains commands, plans a step, runs it and publishes what came of it.

The only room that imports torch together with `model`. Owns the model, its KV memory and the loop; who computes what is
decided in `scheduler`.
"""
