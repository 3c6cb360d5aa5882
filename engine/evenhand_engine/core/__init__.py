"""The engine core process: one loop that drains commands, plans a step, runs it and publishes what came of it.

The only room that imports torch together with `model`. Owns the model, its KV memory and the loop; who computes what is
decided in `scheduler`.

    the process     engine: its loop and its end; `connections` to the HTTP side; `stats` and `step_recorder`, what it tells
    loading         loading: from settings to a warm runner, or by device_loading onto a GPU; warm_up
    on the CPU      model_runner, with staging (what is known of each seat) and sampler
    on a GPU        device_runner, one step ahead: device_seats, step_layout (one copy a step), device_adjustments, device_sampling
    on several      tensor_parallel, workers
    one output      adjustments: masks, biases, penalties; followers: where it is in its `reasoning` and its grammar;
                    structures, whose grammars compile_queue compiles; token_logprobs, prompt_logprobs
"""
