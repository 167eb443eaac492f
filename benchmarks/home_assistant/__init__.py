"""A recorded session of a real fleet with a real Home Assistant."""
