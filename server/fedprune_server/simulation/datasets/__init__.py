"""Data sets for simulations: files read, dealt out to devices, loaded when they train."""
