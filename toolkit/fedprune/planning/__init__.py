"""How wide a board's model is: candidates, predictions, the plan."""
