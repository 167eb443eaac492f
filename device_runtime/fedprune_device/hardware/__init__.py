"""The board's hardware and its measurements: probe, layer times, memory, temperature.

Not here: profiles and reports as data (`fedprune.planning`).
"""
