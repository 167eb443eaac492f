"""What every command prints: tables, progress, examples, and how to install an extra.

Not here: what a single command reports (the `cli` room of its wing).
"""
