"""The server's settings: their types, their sources (file, environment, command line), their errors.

Not here: what a setting leads to. The room that uses a setting reads it from `ServerConfig`.
"""
