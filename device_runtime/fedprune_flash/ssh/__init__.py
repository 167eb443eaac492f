"""Installation over SSH: inventory, journal, claims, many boards at once.

Not here: the code that runs on the board (`on_board.remote_agent`).
"""
