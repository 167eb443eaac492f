"""Training graphs: losses, optimisers, memory, and values that are computed twice."""
