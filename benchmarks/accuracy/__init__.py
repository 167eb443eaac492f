"""Accuracy of strategies on real data: `python -m benchmarks.accuracy TABLE`."""
