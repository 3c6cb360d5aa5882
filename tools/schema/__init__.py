"""Build tools: what is written from the structs of `evenhand_policy`, and is no part of what is installed."""
