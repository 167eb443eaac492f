"""The cost of a submodel: multiplications, bytes, time and memory, from tables and measurements.

Not here: what a certain board has (`hardware`) and how wide its model gets (`planning`).
"""
