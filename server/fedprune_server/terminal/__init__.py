"""Log lines, the live table of a job, and progress on the server's terminal.

Not here: tables of commands in general (`fedprune.output`).
"""
