"""Who computes what, every step. Pure: no clock, no randomness, no I/O, no numpy or torch; time is an argument.

Lives in the engine core process, in the simulator and in tests: all drive this very code. Imports the policy contract and
the engine's settings, nothing else of the engine.

A step (`scheduler`, which reads top to bottom as this list):

    expire    queued requests past their tenant's queue timeout leave                                  queue_timeouts
    limit     the least served who contends sets how far ahead one may be                      order, ledger
    room      whoever the last step starved of memory or a seat may preempt                              preemption
    pause     what runs for tenants beyond the limit keeps its memory and computes nothing               preemption
    budget    tokens, and the seconds that inter-token objectives leave                                  pace, step_time
    decode    one token for every stream, guesses of the next; where there is no room they take turns    turns, speculation
    prefill   chunks of prompts, the least served tenant's first, while the budget lasts                 admission, order, capacity
    close     the virtual time moves to the least served of those left out                               ledger

and when its batch was computed, one step or `pipeline_depth` steps later:

    update    tokens are appended, blocks become known for reuse, requests end                           results
    abort     what a request computed past its stop string is given back, within a bound            scheduler, results

The rule on a line. Virtual service v is what a tenant was served, over its weight:

    virtual time V                                                   limit = v of the least served + lead
         │                                                                │
    ─────●──────────●─────────────●───────────────●───────────────────────┼─────●──────▶ v
      left out      computes      computes        computes                │     held: starts nothing, pauses
      last step     first                         last

Nobody's v is below V, so silence earns nothing; a step that leaves nobody out moves V to the highest v, so using what
nobody wanted costs nothing. docs/fairness.md says what follows and proves it.

Who owns what:

    ledger, fair_share               charges, virtual service and time; no memory, no seats
    request_table, tenant, tenant_queue    a request's place: waiting, prefilling, decoding, gone
    capacity, block_manager          seats; KV blocks, prefixes, guarantees
    pace, step_time                  the fit of step times
    request, batch                   one prompt; what one step computes, as data for the runner
"""
