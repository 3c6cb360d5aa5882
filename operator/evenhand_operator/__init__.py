"""Kopf operator: compiles TenantPolicy resources and pushes scheduler configs to engine pods."""
