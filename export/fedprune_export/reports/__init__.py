"""Reports of an export and of a roofline, as data, Markdown and HTML.

Not here: HTML and charts in general (`fedprune.output`).
"""
