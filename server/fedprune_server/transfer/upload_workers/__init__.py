"""Processes that take in updates beside the server's own."""
