"""The one renderer of reports: data in, HTML with inline SVG out.

Not here: models, jobs or runs. The caller gives the words and numbers to show.
"""
