"""Child processes: start, talk over pipes, end with the parent.

Not here: what a child does. Each room that has a child keeps its program.
"""
