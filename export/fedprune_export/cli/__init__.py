"""The commands of `fedprune-export`, one module per verb.

Not here: compilation. `fedprune_export.api.export` puts the steps of an export in order.
"""
