"""A fleet of thousands of devices with real connections, messages and updates: `python -m benchmarks.swarm`."""
