"""The architecture of a model and its submodels: channel groups, selections, widths, element masks.

Not here: how a submodel is chosen (`strategies`) or what it costs (`planning`).
"""
