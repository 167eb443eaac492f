"""Errors, checks of values, files, random numbers and texts that every wing needs.

Not here: anything that knows a model, a message or a job.
"""
