"""What happens at the door, whoever generates: identity, admission and quotas, the config in force, metrics.

Lives in the HTTP process that owns what tenants share. API servers that are processes of their own reach it by `remote_door`,
which a `doorkeeper` answers; handlers ask a `door` and need not know which. Each module owns its state: `account` what a
tenant has used and has in flight, `quota` its buckets, `body_memory` the bytes that its requests hold, `config_in_force` the
config in force, which `push_receiver` and `policy_source` replace, `metrics` and `token_meter` the instruments. Decisions
(`admission`, `account`, `quota`, `share_tracker`) are pure: time comes in as an argument.
"""
