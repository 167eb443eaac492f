"""Forward passes: the active model, its slots, and predictions."""
