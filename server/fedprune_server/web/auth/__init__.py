"""Operators, passwords, roles, sessions, and what every request must pass."""
