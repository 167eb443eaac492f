"""Data sets for simulations and experiments: files read, dealt out to devices, and handed over only when they train."""
