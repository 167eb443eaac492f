"""A benchmark of two aggregators: a fleet of up to 100,000 boards with identities, connected in turns."""
