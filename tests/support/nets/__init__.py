"""Models that tests cut, train and run, and Hypothesis strategies that draw them."""
