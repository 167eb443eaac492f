"""A model whose channels can be cut: the cut, the masked reference, and what keeps a width fixed."""
