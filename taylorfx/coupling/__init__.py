"""Coupling: the units of a network, what leaves together."""
