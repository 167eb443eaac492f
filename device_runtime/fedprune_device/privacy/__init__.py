"""Limits on data that leave the board: the owner's policy, the count of private updates, redacted texts.

Not here: the noise itself (`fedprune.updates`).
"""
