"""Tasks other than classifying images, on real data: `python -m benchmarks.tasks`."""
