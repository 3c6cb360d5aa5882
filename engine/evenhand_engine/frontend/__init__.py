"""What happens at the door, whoever generates: identity, admission and quotas, the config in force, metrics.

Lives in the HTTP process that owns what tenants share. API servers that are processes of their own reach it by `remote_door`,
which a `doorkeeper` answers; handlers ask a `door` and need not know which. Each module owns its state: `account` what a
tenant has used and has in flight, `quota` its buckets, `body_memory` the bytes that its requests hold, `config_in_force` the
config in force, which `push_receiver` and `policy_source` replace, `metrics` and `token_meter` the instruments. Decisions
(`admission`, `account`, `quota`, `share_tracker`) are pure: time comes in as an argument.

    how it was started   settings; keys: what handlers find on an application and on a request
    who it is            auth: from headers to a tenant (what identities there are: evenhand_policy); local_request: from this machine?
    what it may send     admission (and when to try again), account (with its pace, which Retry-After follows), quota; body_memory;
                         claims: what one request holds of these until it ends
    one door, two ends   door; here service, or remote_door ──channel, door_messages──▶ doorkeeper; engine_service: what stands
                         beside a door at the public port of our own engine
    the config           config_in_force, kept by config_store; push_receiver (request_verifier, pod_identity), policy_source
    how it waits         fair_executor: long computations, a tenant at a time; directory_watch: files that change
    how it is answered   event_writer: to one client, at its pace; write_timeout: no slower than that
    what is told         metrics, counted as things happen; metrics_collector, the core's own numbers, read when asked for;
                         histograms, token_meter, share_tracker
"""
