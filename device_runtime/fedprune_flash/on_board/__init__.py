"""What runs on a board and not on a PC: the installer of kits, and the far side of `fedprune-flash ssh`.

Both need Python's standard library alone.
"""
