"""One module per paper or baseline: its strategy, and the options of its preset."""
