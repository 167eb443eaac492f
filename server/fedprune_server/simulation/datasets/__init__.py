"""Data sets for simulations: reading files, splitting them among devices, loading a device's share while it trains."""
