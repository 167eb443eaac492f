"""One module per method: the papers' strategies, the baselines, and our own."""
