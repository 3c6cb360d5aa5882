"""Grafana's dashboards as a list of panels."""
