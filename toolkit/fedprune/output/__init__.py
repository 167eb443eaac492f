"""Output for people: tables, progress, log lines and examples on a terminal, reports as HTML with inline SVG.

Not here: models, jobs or runs. The caller gives the words and numbers to show.
"""
