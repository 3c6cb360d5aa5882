"""What happens at the door, whoever generates: identity, admission and quotas, the config in force, metrics.

Lives in the HTTP process. Each module owns its state: `account` what a tenant has used and has in flight, `quota` its buckets,
`body_memory` the bytes that its requests hold, `config_in_force` the config in force, which `push_receiver` and `policy_source`
replace, `metrics` and `token_meter` the instruments. Decisions (`admission`, `account`, `quota`, `share_tracker`) are pure: time comes in as an argument.
"""
