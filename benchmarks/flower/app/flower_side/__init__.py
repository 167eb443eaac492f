"""Flower's side of the comparison, run by its SuperLink and SuperNodes in an environment of their own."""
