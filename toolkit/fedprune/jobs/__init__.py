"""A job: its settings, its schedule, and the state that its coordinator keeps.

Not here: decisions (`coordination`). The state holds digests and numbers, never weights.
"""
