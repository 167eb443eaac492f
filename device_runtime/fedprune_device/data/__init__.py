"""The board's samples in memory and on disk, their labels, splits and batches.

Not here: samples sent to anybody. No module of this room opens a connection.
"""
