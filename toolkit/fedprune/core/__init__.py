"""Errors, checks of values, files, random numbers and texts that every package needs.

Not here: anything that knows a model, a message or a job.
"""
