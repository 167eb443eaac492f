"""Folders and files as boards' owners have them, read as a board reads them and compared with what was written."""
