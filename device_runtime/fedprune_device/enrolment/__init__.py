"""How a board joins a fleet and shows its membership."""
