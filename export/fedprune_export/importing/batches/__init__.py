"""Finds the batch of a file: gives each input and output a free batch as its first axis.

A file may have its batch on the second axis, or take batches of one size only. `free_batch` rewrites its graph and
proves by the file itself that the result computes the same for every sample.
"""

from fedprune_export.importing.batches.freeing import free_batch

__all__ = ["free_batch"]
