"""Where a training step's time goes: rooflines, benchmarks, the machine's peak.

Not here: what a board measures of itself (`fedprune_device.hardware`).
"""
