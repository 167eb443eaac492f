"""One round's computation: received weights in, an update and a new model out.

Not here: downloads, uploads and when to train (`network`, `agent`).
"""
