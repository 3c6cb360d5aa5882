"""Who is sent next to an engine that somebody else wrote, and when: the scheduler's ledger and order before a window.

    add ──▶ Dispatcher: tenants' queues, weights, classes, users ──▶ Window: is there room upstream? ──▶ sent

Pure: no clock, no asyncio, no HTTP. The sidecar's proxy drives it with what it sees on the wire, the simulator with what a
simulated engine says. Owns what is queued and what is known of the requests in flight.
"""
