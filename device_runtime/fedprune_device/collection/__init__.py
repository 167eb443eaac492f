"""Samples of sensors and cameras, sent to a running board through its local interface.

Not here: the set that keeps them (`data.sample_store`), files of samples (`cli.collect`).
"""
