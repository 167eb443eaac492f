"""The built-in losses, each in the file of its name: labels, graph and gradient, memory. No other file lists them."""

from importlib import import_module
from pkgutil import iter_modules

from fedprune.model.loss import Loss

# Losses by name.
LOSSES: dict[str, Loss] = {m.name: import_module(f"{__name__}.{m.name}").LOSS for m in iter_modules(__path__)}
