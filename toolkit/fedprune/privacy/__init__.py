"""Differential privacy: settings, noise on an update, and the accounting of its cost.

Not here: a board owner's own rules (`fedprune_device.privacy`) and each device's budget (`coordination`).
"""
