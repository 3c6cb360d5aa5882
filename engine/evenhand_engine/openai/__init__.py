"""OpenAI's wire format, with vLLM's additions: bodies in, answers, event streams and errors out.

    bytes ─bodies─▶ typed fields (schema) ─prompts─▶ token ids ─generation─▶ deltas ─stream─▶ JSON or events

A delta is read, rendered and written in the call in which the backend brings it (`deltas`, `events`).

/v1/responses is a chat in other words: `response_bodies` turns it into one, `response_items` turns what came of it back, and
`message_answer` writes it, as it does for other endpoints of that kind.

    in          reading: a body within its memory; members, those of a body that are large or of several shapes
    an output   structure, tools, reasoning: what it must look like and may hold; messages: reading a chat's back
    endpoints   chat, completions, render, tokens, response_api; answers, response_answers: what the document says of them
    likelihood  logprobs

Lives in the HTTP process. Knows JSON and server-sent events, not who the tenant is or what generates. A new field, endpoint
or error of the API belongs here: its type in `schema`, what it does to a prompt in `prompts`, to the sampling in `generation`,
to the answer in the endpoint's `Format` (`chat`, `completions`).
"""
