"""Who stays: budgets, constraints, and the ways to choose."""
