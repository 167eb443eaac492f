"""The files of a board's bundle, their verification, and conversion back to ONNX and torch.

Not here: reading and writing the folder (`fedprune.runtime`), which boards do, too.
"""
