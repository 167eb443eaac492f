"""The operators' console: a process of its own, and the files that the server and it share.

Not here: decisions on a job. An operator's order is handed to the server's loop or to a thread.
"""
