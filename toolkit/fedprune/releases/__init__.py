"""Releases of the runtime, their files and their roll-out."""
