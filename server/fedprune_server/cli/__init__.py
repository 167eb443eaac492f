"""The commands of `fedprune-server` and `fedprune-simulate`, one file per command.

Not here: work. `main` wires a running server together.
"""
