"""Programs that run on a board and not on the PC: the installer of kits, and the remote end of `fedprune-flash ssh`.

Not here: anything that needs more than the standard library.
"""
