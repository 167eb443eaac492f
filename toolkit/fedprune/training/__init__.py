"""What is trained and how: the recipe, and the names of a training graph's inputs and outputs."""
