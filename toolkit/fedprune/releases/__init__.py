"""Releases of the boards' runtime: signed manifests, wheels, and the state machine of a rollout.

Not here: sending and installing them (the server's `ota`, the board's `releases`).
"""
