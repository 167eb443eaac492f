"""Reports of an export, as data, Markdown and HTML.

Not here: HTML and charts in general (`fedprune.output`).
"""
