"""Anthropic's wire format: /v1/messages, as its own client speaks it. A chat in other words.

    bytes ─bodies─▶ the body of a chat that asks the same ─▶ openai's reading and generation ─blocks─▶ blocks and events

`api` has the routes, `answers` what the published document says of them. Quotas, limits and refusals are the chat's; a refusal
names the field of the message.
"""
