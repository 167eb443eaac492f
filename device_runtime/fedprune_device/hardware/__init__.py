"""What the board is and what it measures of itself."""
