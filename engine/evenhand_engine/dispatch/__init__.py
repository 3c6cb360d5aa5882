"""Who is sent next to an engine that somebody else wrote, and when: the scheduler's ledger and order before a window.

    add ──▶ dispatcher: tenants' queues, weights, classes, users ──▶ window: is there room upstream? ──▶ sent

    by what the window knows: steps (when the upstream's end), prefill_rate (how fast it reads prompts), gauges (what it reports, late)

Pure: no clock, no asyncio, no HTTP. The sidecar's proxy drives it with what it sees on the wire, the simulator with what a
simulated engine says. Owns what is queued and what is known of the requests in flight.
"""
