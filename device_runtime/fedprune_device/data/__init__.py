"""A board's samples in memory and on disk, and how batches are drawn from them."""
