"""What happens at the door, whoever generates: identity, admission and quotas, the config in force, metrics.

Lives in the HTTP process. Each module owns its state: `quota` the token buckets, `config_store` and `push_receiver` the config
in force, `metrics` the instruments. Decisions (`admission`, `quota`, `share_tracker`) are pure: time comes in as an argument.
"""
