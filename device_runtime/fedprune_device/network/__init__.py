"""The board's place in its fleet: joining, signed messages, downloads of blobs, uploads of updates.

Not here: what follows from a message (`agent`, `releases`), keys and certificates as such (`fedprune.security`).
"""
