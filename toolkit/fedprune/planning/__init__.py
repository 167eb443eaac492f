"""Boards and costs: hardware profiles, predicted time and memory of a submodel, and how wide a board's model is.

Not here: measuring a board (`fedprune_device.hardware`) and replanning while a job runs (`coordination.width_planner`).
"""
