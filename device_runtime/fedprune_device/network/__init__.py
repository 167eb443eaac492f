"""The connection to the server: signed messages, downloads of blobs, uploads of updates.

Not here: what follows from a message (`agent`, `releases`).
"""
