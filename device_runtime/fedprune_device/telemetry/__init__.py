"""Warnings, errors and crash reports of the board, kept and sent to the server.

Not here: metrics of training, which travel in the update (`training.evaluation`).
"""
