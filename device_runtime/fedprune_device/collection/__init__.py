"""Samples of sensors and cameras, handed in to a board that runs by its local interface.

Not here: the set that keeps them (`data.sample_store`), files of samples (`cli.collect`).
"""
