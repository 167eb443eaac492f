"""What may leave a board, and in which words."""
