"""Normalised graphs run and differentiated by torch, for simulations of many devices at once.

Not here: anything that a board or an export uses.
"""
