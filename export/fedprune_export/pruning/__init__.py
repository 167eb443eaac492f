"""A model whose channels can be cut: the cut, the masked reference, fixed widths.

Not here: which channels are kept; a `Selection` of the toolkit says so.
"""
