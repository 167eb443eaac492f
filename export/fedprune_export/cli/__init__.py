"""The commands of `fedprune-export`, one module per verb.

Not here: compilation. `export_job` puts the steps of an export in order.
"""
