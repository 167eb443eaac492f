"""The same federated job by fedprune and by Flower, side by side: `python -m benchmarks.flower`."""
