"""The network as data, and the pure functions that run it."""
