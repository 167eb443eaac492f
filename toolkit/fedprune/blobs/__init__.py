"""Content-addressed files on the disk."""
