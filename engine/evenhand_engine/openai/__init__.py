"""OpenAI's wire format, with vLLM's additions: bodies in, answers, event streams and errors out.

Lives in the HTTP process. Knows JSON and server-sent events, not who the tenant is or what generates. A new field, endpoint
or error of the API belongs here.
"""
