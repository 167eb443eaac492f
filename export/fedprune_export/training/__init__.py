"""Training graphs: forward, loss, metric, backward, optimiser, and the memory that a step takes.

Not here: gradients of single operators (`autodiff`) and the files of a bundle (`bundles`).
"""
