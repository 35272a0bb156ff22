"""Exact rewrites, from network to network."""
