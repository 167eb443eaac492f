"""One round's computation, from received weights to an update."""
