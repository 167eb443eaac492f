"""The state directory: what a board keeps, and who may write it."""
