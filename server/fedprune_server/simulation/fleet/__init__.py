"""Simulated boards and what computes their training."""
