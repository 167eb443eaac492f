"""Scores of channels and elements, and what they are computed from."""
