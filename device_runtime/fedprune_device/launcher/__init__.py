"""The program that starts the installed release and goes back when a new one fails.

Not here: anything that needs more than the standard library.
"""
