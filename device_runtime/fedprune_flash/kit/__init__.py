"""The kit that installs the runtime: wheels, settings, service files, installer archive.

Not here: the way to the board (`image`).
"""
