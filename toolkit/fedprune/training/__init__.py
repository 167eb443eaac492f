"""The recipe of local training, and the names of a training graph's inputs and outputs.

Not here: graphs themselves (`fedprune_export.training`) and the loop that runs them (`fedprune_device.training`).
"""
