"""The board's interface for the application beside it: predictions, and samples to learn from."""
