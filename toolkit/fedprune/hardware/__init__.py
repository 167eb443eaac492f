"""What a board is: hardware profiles, probe reports, and which profile fits.

Not here: the measuring itself (`fedprune_device.hardware`).
"""
