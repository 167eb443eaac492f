"""Normalised graphs run and differentiated by torch, for simulations: many devices' steps at once, also on a GPU."""
