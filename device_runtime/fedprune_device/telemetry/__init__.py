"""Crash reports of the board, kept and sent to the server.

Not here: its log, which is the journal's; metrics of training, which travel in the update (`training.evaluation`).
"""
