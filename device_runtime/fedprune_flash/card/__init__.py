"""Cards and drives that an image is written to."""
