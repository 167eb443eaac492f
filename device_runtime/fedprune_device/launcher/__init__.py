"""The program that starts the installed runtime; standard library only."""
