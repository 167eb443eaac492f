"""The operators' console: a process of its own, and the server's side of the pipes to it.

Not here: decisions on a job. An operator's order is handed to the server's loop or to a thread.
"""
