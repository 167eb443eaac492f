"""How wide a board's model is: candidate widths, predicted costs, the plan.

Not here: replanning while a job runs (`coordination.width_planner`).
"""
