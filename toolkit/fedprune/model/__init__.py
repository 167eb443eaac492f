"""The architecture of a model, its submodels (selections, widths, element masks), and the recipe of local training.

Not here: how a submodel is chosen (`strategies`) or what it costs (`planning`), and training graphs themselves.
"""
