"""A state folder checked, repaired, backed up, restored and replayed.

Not here: anything that the running server needs (`storage`).
"""
