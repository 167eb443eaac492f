"""All that the compiler knows of an operator, in the file of its family: channel rule, rewrite, mask and gradient rule.

Importing the package registers all of them. To support an operator, write it into the file of its family; a new family
is a new file. `norm_vectors` has what the families of norms share.

Channel rules tie the indices that can only be cut together, by *atoms* (integers that name the indices of an axis), and
fix those that stay. Gradient rules write the forward pass and return the *pull*, which writes the inputs' gradients.
"""

from importlib import import_module
from pkgutil import iter_modules

for _family in iter_modules(__path__):
    import_module(f"{__name__}.{_family.name}")
