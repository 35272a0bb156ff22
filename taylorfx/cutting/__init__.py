"""Cutting: plans, and taking out of trees what leaves."""
