"""A board's image, changed in place without mounting it."""
