"""Child processes and web servers: start them, talk to them, end them with the parent.

Not here: what a child does, and what a web server answers. Each room that has one keeps its program.
"""
