"""A state folder checked, repaired, backed up and restored.

Not here: anything that the running server needs (`storage`).
"""
