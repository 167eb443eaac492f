"""Crash reports and last warnings of the board, kept and sent to the server.

Not here: its whole log, which is the journal's; metrics of training, which are in the update (`training.evaluation`).
"""
