"""A fleet of real boards' processes behind bad links and a broker that keeps dying: `python -m benchmarks.weather`."""
