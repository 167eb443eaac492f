"""The local HTTP interface: predictions, samples and status for applications on the board.

Not here: the client that applications use (`client`).
"""
