"""Structured output: what an output must look like, as grammars that tell which token may come next.

    a schema, regex, choice, grammar ─grammars, tools─▶ one text ─compiler─▶ matcher, per tenant ─▶ a mask for each token

Both processes have it: the HTTP process compiles to refuse by name what cannot be, the engine core to compute masks. Grammars
come from tenants, so everything is bounded: their size, the work of compiling, that of each mask, and what is kept.
"""
