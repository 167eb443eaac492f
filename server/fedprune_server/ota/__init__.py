"""Releases of the boards' runtime on their way to boards."""
