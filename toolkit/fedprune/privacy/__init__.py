"""Noise on updates, and the accounting of what it costs."""
