"""What the board is and measures of itself: probe, layer times, memory, temperature.

Not here: profiles and reports as data (`fedprune.planning`).
"""
