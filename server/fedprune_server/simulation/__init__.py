"""Fleets on a virtual clock, their data and circumstances, and reports of what came of them."""
