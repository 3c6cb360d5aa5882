"""The contract between operator and engine: TenantPolicy resources, their compiler, and SchedulerConfig.

Imports the standard library, msgspec and PyYAML only, so that both sides can load it cheaply.
"""
