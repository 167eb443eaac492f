"""Everything that computes on an NVIDIA GPU, checked and timed on a real one."""
