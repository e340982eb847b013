"""Desired rows made real: each module keeps one real thing equal to one table."""
