"""Files on disk named by their SHA-256: stores, partial files, single tensors of a stored file.

Not here: moving blobs between machines (`wire`, the server's `transfer`, the board's `network`).
"""
