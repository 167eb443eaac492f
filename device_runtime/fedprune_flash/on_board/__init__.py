"""The installer of kits, which runs on the board and not on the PC.

Not here: anything that needs more than the standard library.
"""
