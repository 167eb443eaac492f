"""The command line: one file per command, argv and printing only."""
