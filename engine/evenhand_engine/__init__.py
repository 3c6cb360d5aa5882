"""The inference engine: OpenAI-compatible server, fair scheduler, model runner and command line."""
