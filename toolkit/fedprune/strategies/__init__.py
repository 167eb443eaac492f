"""Strategies: compositions of roles, each with one paper behind it."""
