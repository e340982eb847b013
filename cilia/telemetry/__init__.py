"""Logs and metrics: one shape for every service."""
