"""Real processes and tools that tests start."""
