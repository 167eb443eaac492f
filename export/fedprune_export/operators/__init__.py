"""All that the compiler knows of an operator, in the file of its family: channel rule, rewrite, mask and gradient rule.

Importing the package registers all of them. To support an operator, write it into the file of its family; a new family
is a new file. `norm_vectors` has what the families of norms share.
"""

from importlib import import_module
from pkgutil import iter_modules

for _family in iter_modules(__path__):
    import_module(f"{__name__}.{_family.name}")
