"""The commands of `fedprune-device`, one module per verb.

Not here: decisions. A command reads its options, builds the objects and runs them.
"""
