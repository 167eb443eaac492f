"""Shared by every package: errors, validation, files, processes, random numbers, text, and the list of metrics.

Not here: anything that knows a model's tensors, a message or a job.
"""
