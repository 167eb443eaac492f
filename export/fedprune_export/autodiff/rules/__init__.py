"""Gradient rules of the operators, one family of operators per module."""
